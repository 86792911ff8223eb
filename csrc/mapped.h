#pragma once
// mapped: tensors that are pages of their file, not copies of them.
//
// A mapped array is made in no time, is read as it is used, and has its bytes
// in the system's cache of files: once for all processes, and still there for
// the next one. Its pages are private: what an op writes into a buffer that it
// takes over never reaches the file.
//
// A file that is replaced or deleted stays what it was under the map. One that
// is cut, or whose disk fails, raises SIGBUS where its pages are read: the
// handler puts zeros there, so that nothing crashes, and notes it. Whoever
// evaluates asks lost_mapped() before a result is used.

#include <cstddef>
#include <optional>

#include "mlx/mlx.h"

namespace pyengine {

namespace mx = mlx::core;

// Whether arrays can be made of mapped memory: where MLX runs on a processor
// alone, by the allocator that this file was written for, under Linux.
bool can_map();

// A tensor from byte `begin` of an open file on; none where it cannot be
// mapped: begins at no multiple of its numbers, or is refused by the system.
// Throws where the file has not so many bytes.
std::optional<mx::array>
map_tensor(int file, size_t begin, mx::Shape shape, mx::Dtype dtype);

// Reads `size` bytes of a mapped array from byte `begin` on, as it would be
// read in use; false where it is none. Throws where they cannot be read.
bool read_mapped(const mx::array& a, size_t begin, size_t size);

size_t mapped_bytes(); // of all arrays
bool lost_mapped(); // whether zeros have taken the place of any

} // namespace pyengine
