#pragma once
// MLX's header of this name adds bfloat overloads to Metal's library. Ours has
// them already, so it is left out by standing in front of it.
