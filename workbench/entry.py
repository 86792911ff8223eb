"""The C function through which the runtime calls one kernel."""

from __future__ import annotations

from dataclasses import dataclass

from .rewrite import Parameter, Unit

SYMBOL = "workbench_kernel"
FIRST_THREADGROUP_SLOT = 32  # buffers come first

# Values of `const msl_context* t` (include/msl/entry.h)
BUILTINS = {
    "thread_position_in_grid": "t->position_in_grid",
    "thread_position_in_threadgroup": "t->position_in_group",
    "threadgroup_position_in_grid": "t->group_position",
    "threads_per_threadgroup": "t->group_size",
    "dispatch_threads_per_threadgroup": "t->group_size",
    "threadgroups_per_grid": "t->groups",
    "threads_per_grid": "t->grid_size",
    "grid_size": "t->grid_size",
    "thread_index_in_threadgroup": "t->thread_",
    "thread_index_in_simdgroup": "t->lane",
    "simdgroup_index_in_threadgroup": "t->simdgroup",
    "simdgroups_per_threadgroup": "t->simdgroups",
    "dispatch_simdgroups_per_threadgroup": "t->simdgroups",
    "threads_per_simdgroup": "32u",
    "thread_execution_width": "32u",
    "thread_index_in_quadgroup": "t->thread_ % 4",
    "quadgroup_index_in_threadgroup": "t->thread_ / 4",
    "quadgroups_per_threadgroup": "t->simdgroups * 8",
}


@dataclass(frozen=True)
class Entry:
    """The code of an entry point and the buffers that the kernel takes."""

    code: str
    buffers: dict[int, str]  # index -> name
    optional: list[int]  # buffers that some launches do not have
    threadgroup: dict[int, str]
    threads: int  # most of a threadgroup; 0 where the kernel does not say


def entry_point(unit: Unit, kernel: str) -> Entry:
    """Write the entry point of a kernel; see `kernel_of` for its names and errors."""
    target, name = kernel_of(unit, kernel)
    slots = Slots(unit.kernels[name])
    arguments = ", ".join(
        slots.argument(i, parameter) for i, parameter in enumerate(unit.kernels[name])
    )
    code = (
        f'\n#line 1 "entry point"\nusing workbench_kernel_type = decltype({target});\n'
        f'extern "C" __attribute__((visibility("default"))) MSL_UNCHECKED void\n'
        f"{SYMBOL}(void* const* b, const msl_context* t) {{\n  {target}({arguments});\n}}\n"
    )
    code = within(unit.namespaces[name], code)
    threads = unit.threads.get(name, 0)
    return Entry(code, slots.buffers, slots.optional, slots.threadgroup, threads)


def within(namespace: str, code: str) -> str:
    """Code in a namespace; in none if that is the empty text."""
    return f"\nnamespace {namespace} {{{code}}}\n" if namespace else code


def kernel_of(unit: Unit, kernel: str) -> tuple[str, str]:
    """How C++ writes a kernel, given by host name, name or `template<arguments>`, and its name.

    Raises:
        ValueError: The unit has no such kernel.
    """
    target = unit.hosts.get(kernel, kernel)
    name = target.partition("<")[0].split("::")[-1].strip()
    plain = "<" not in target and kernel not in unit.hosts
    if name not in unit.kernels or (plain and name in unit.templates):
        known = sorted({*unit.hosts, *(k for k in unit.kernels if k not in unit.templates)})
        listed = ", ".join(known[:8]) + (", ..." if len(known) > 8 else "")
        raise ValueError(f"[workbench] kernel must be one of {listed} but got {kernel}.")
    return target, name


class Slots:
    """Hands out buffer slots: the given indices, then the lowest free ones in order."""

    def __init__(self, parameters: list[Parameter]) -> None:
        given = [p.attributes.get("buffer", "") for p in parameters]
        self.taken = {int(index) for index in given if index.isdigit()}
        self.buffers: dict[int, str] = {}
        self.optional: list[int] = []
        self.threadgroup: dict[int, str] = {}

    def argument(self, i: int, parameter: Parameter) -> str:
        for attribute in parameter.attributes:
            if attribute in BUILTINS:
                value = BUILTINS[attribute]
                return f"msl_entry::builtin<workbench_kernel_type, {i}>({value})"
        if not parameter.is_memory:
            raise ValueError(
                f"[workbench] kernel parameter `{parameter.text}` must be a buffer or a built-in "
                f"value but has attributes {sorted(parameter.attributes)}."
            )
        if "threadgroup" in parameter.attributes:
            index = int(parameter.attributes["threadgroup"])
            self.threadgroup[index] = parameter.name
            slot = FIRST_THREADGROUP_SLOT + index
        else:
            slot = self.buffer_slot(parameter)
            self.buffers[slot] = parameter.name
            if "function_constant" in parameter.attributes:
                self.optional.append(slot)
        return f"msl_entry::buffer<workbench_kernel_type, {i}>(b[{slot}])"

    def buffer_slot(self, parameter: Parameter) -> int:
        index = parameter.attributes.get("buffer", "")
        if index.isdigit():
            return int(index)
        slot = next(s for s in range(FIRST_THREADGROUP_SLOT) if s not in self.taken)
        self.taken.add(slot)
        return slot
