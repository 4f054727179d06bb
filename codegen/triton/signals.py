"""A barrier between the same block of all ranks, on signal pads in symmetric memory.

Law: rank r, block b, and each peer p of W ranks. A pad holds one 32-bit word per (block, sender):

    put    CAS.release.sys  pad of p [b, r]:  0 -> token       spins while the last one is unread
    wait   CAS.acquire.sys  pad of r [b, p]:  token -> 0       spins while nothing was put

The token is the number of blocks launched, so that two ranks with different grids find out at
block 0 instead of waiting for blocks that nobody launched: any other word than 0 or the token ends
the kernel with a trap, as does a peer that stays away for TIMEOUT_NS. Every pad is 0 again after
the barrier. Blocks must run at the same time as their peers' blocks of the same number: launch no
more of them than the device holds at once.

`put` and `wait` are PTX because Triton has no system-scope CAS on an address held as an integer
and no per-thread branch; thread p serves peer p, whatever layout Triton gives its tensors. Source
of the protocol: `sync_remote_blocks` of PyTorch's symmetric memory; the token and the limit are
ours. `ridgeline.codegen.symmetric_memory` checks it exhaustively.
This file needs only triton.
"""

import triton
import triton.language as tl

TIMEOUT_NS = tl.constexpr(60_000_000_000)
"""How long a block waits for a peer, in nanoseconds, before the kernel ends with a trap."""

# $0 result, $1 table of the pads' addresses, $2 rank, $3 ranks, $4 block, $5 token, $6 limit in ns
_BARRIER = tl.constexpr("""
{
    .reg .pred  %outside, %own, %again, %late, %odd;
    .reg .b32   %thread, %seen, %slot;
    .reg .b64   %table, %pad, %start, %now, %offset;

    mov.u32             $0, 0;
    mov.u32             %thread, %tid.x;
    setp.ge.u32         %outside, %thread, $3;
    @%outside bra       done;
    setp.eq.u32         %own, %thread, $2;
    @%own bra           done;
    mov.u64             %start, %globaltimer;

    mul.wide.u32        %offset, %thread, 8;
    add.u64             %table, $1, %offset;
    ld.global.u64       %pad, [%table];
    mad.lo.u32          %slot, $4, $3, $2;
    mul.wide.u32        %offset, %slot, 4;
    add.u64             %pad, %pad, %offset;
put:
    atom.release.sys.global.cas.b32 %seen, [%pad], 0, $5;
    setp.eq.u32         %again, %seen, 0;
    @%again bra         sent;
    mov.u64             %now, %globaltimer;
    sub.u64             %now, %now, %start;
    setp.gt.u64         %late, %now, $6;
    @%late trap;
    bra                 put;
sent:
    mul.wide.u32        %offset, $2, 8;
    add.u64             %table, $1, %offset;
    ld.global.u64       %pad, [%table];
    mad.lo.u32          %slot, $4, $3, %thread;
    mul.wide.u32        %offset, %slot, 4;
    add.u64             %pad, %pad, %offset;
wait:
    atom.acquire.sys.global.cas.b32 %seen, [%pad], $5, 0;
    setp.eq.u32         %again, %seen, $5;
    @%again bra         done;
    setp.ne.u32         %odd, %seen, 0;
    @%odd trap;
    mov.u64             %now, %globaltimer;
    sub.u64             %now, %now, %start;
    setp.gt.u64         %late, %now, $6;
    @%late trap;
    bra                 wait;
done:
}
""")


@triton.jit
def barrier(pads_ptr, rank, ranks, TIMEOUT: tl.constexpr = TIMEOUT_NS):
    """Returns when this block of every rank has come here; what each wrote before is then seen.

    pads_ptr: int64 [ranks], the address of each rank's pad of at least blocks × ranks zero words;
    needs as many threads as ranks. Grids of more than one dimension are not meant.
    """
    tl.debug_barrier()  # what other threads of the block wrote goes before the release
    tl.inline_asm_elementwise(
        _BARRIER,
        "=&r,l,r,r,r,r,l",
        [
            pads_ptr.to(tl.int64, bitcast=True),
            rank.to(tl.int32),
            tl.full((), ranks, tl.int32),
            tl.program_id(0),
            tl.num_programs(0),
            tl.full((), TIMEOUT, tl.int64),
        ],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )
    tl.debug_barrier()  # and the acquire goes before what they read next
