"""One target on several machines: each multiplies its share, the first one thinks.

Rank 0 does what a single process does: prompts, drafts, sampling, acceptance, pages. Where its
target is called it tells the other ranks so, with what the call reads; they run the same layers on
their shares of heads and feed-forward columns, and the parts are added in the order of ranks. So
no rank has to guess what another does, whatever clocks, users or chance make the first one do.

All messages are MLX's own (``mx.distributed``); nothing here opens a socket.
"""
