"""A few PTX instructions, executed one at a time: enough for the signal barrier's text.

Threads share a memory of addresses -> integers and a clock; whoever schedules them chooses whose
turn it is. An instruction that isn't known is an error, so nothing is skipped silently.
"""

import re
from collections.abc import Sequence

_BRANCH = re.compile(r"@%(\w+)\s+(.*)")
_COMPARE = {
    "eq": int.__eq__, "ne": int.__ne__, "ge": int.__ge__, "gt": int.__gt__,
}  # fmt: skip


class Trap(Exception):
    """The thread ended the kernel."""


class Machine:
    """memory: address -> value; clock: nanoseconds, one more per instruction."""

    def __init__(self) -> None:
        self.memory: dict[int, int] = {}
        self.clock = 0
        self.order: list[tuple[str, int]] = []  # (instruction, address) of every atomic done


class Thread:
    """One thread of an inline assembly text whose operands are $0 (the result), $1, ..."""

    def __init__(self, text: str, operands: Sequence[int], thread: int, machine: Machine) -> None:
        self.machine, self.at, self.done = machine, 0, False
        self.registers: dict[str, int] = {"tid.x": thread}
        self.registers |= {f"${i + 1}": value for i, value in enumerate(operands)}
        self.labels: dict[str, int] = {}
        self.code: list[str] = []
        body = text.strip().removeprefix("{").removesuffix("}")
        for line in re.split(r"[;\n]", body):
            line = " ".join(line.split())
            if line.endswith(":"):
                self.labels[line[:-1]] = len(self.code)
            elif line and not line.startswith(".reg"):
                self.code.append(line)

    def value(self, name: str) -> int:
        if name == "%globaltimer":
            return self.machine.clock
        name = name.removeprefix("%")
        return self.registers[name] if name in self.registers else int(name)

    def step(self) -> None:
        """Executes one instruction. Raises Trap."""
        self.machine.clock += 1
        if self.at >= len(self.code):
            self.done = True
            return
        line = self.code[self.at]
        self.at += 1
        if found := _BRANCH.match(line):
            if not self.registers[found[1]]:
                return
            line = found[2]
        op, _, rest = line.partition(" ")
        names = [part.strip().strip("[]") for part in rest.split(",")] if rest else []
        self.execute(op, names)

    def execute(self, op: str, names: list[str]) -> None:
        kind, *modifiers = op.split(".")
        target = names[0].removeprefix("%") if names else ""
        if kind == "trap":
            raise Trap
        if kind == "bra":
            self.at = self.labels[names[0]]
        elif kind == "mov":
            self.registers[target] = self.value(names[1])
        elif kind == "setp":
            compare = _COMPARE[modifiers[0]]
            self.registers[target] = int(compare(self.value(names[1]), self.value(names[2])))
        elif op == "mul.wide.u32":
            self.registers[target] = self.value(names[1]) * self.value(names[2])
        elif op == "mad.lo.u32":
            a, b, c = (self.value(name) for name in names[1:])
            self.registers[target] = (a * b + c) % 2**32
        elif op in ("add.u64", "sub.u64"):
            sign = 1 if kind == "add" else -1
            self.registers[target] = self.value(names[1]) + sign * self.value(names[2])
        elif op == "ld.global.u64":
            self.registers[target] = self.machine.memory[self.value(names[1])]
        elif kind == "atom" and modifiers[1:] == ["sys", "global", "cas", "b32"]:
            address, expected, new = (self.value(name) for name in names[1:])
            seen = self.machine.memory[address]
            self.registers[target] = seen
            if seen == expected:
                self.machine.memory[address] = new
                self.machine.order.append((op, address))
        else:
            raise NotImplementedError(f"{op} {names}")
