"""What C code prints stays off standard output, and what Python prints does not."""

import ctypes

from ridgeline.cost_model.quiet import quiet_c


def test_only_what_c_prints_meanwhile_is_dropped(capfd):
    libc = ctypes.CDLL(None)
    print("before", flush=True)
    with quiet_c():
        libc.puts(b"noise")
    print("after", flush=True)
    libc.puts(b"later")
    libc.fflush(None)
    assert capfd.readouterr().out.split() == ["before", "after", "later"]
