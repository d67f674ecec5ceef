"""Control flow of machine code: which instruction can follow which, and the loops in that."""

import dataclasses
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of SASS. `target`: the label it jumps to; `always`: it is never skipped by a predicate."""

    opcode: str
    target: str | None
    always: bool


class FlowGraph:
    """A function's instructions as a graph.

    Loops are the natural ones of compiler textbooks: a jump back to an instruction that every path to the jump passes.
    So neither a block that was moved behind the end nor a copy of the body before or after the loop is mistaken for it.
    """

    def __init__(self, code: Sequence[Instruction], labels: dict[str, int]):
        self.after = [self._successors(i, instruction, labels, len(code)) for i, instruction in enumerate(code)]
        order = self._postorder()
        self.reached = frozenset(order)
        self.before: dict[int, list[int]] = {i: [] for i in order}
        for i in order:
            for j in self.after[i]:
                self.before[j].append(i)
        self.dominator = self._dominators(order)

    def innermost_loops(self) -> list[frozenset[int]]:
        """The instructions of every loop that has no other loop in it."""
        bodies: dict[int, set[int]] = {}
        for end in self.reached:
            for header in self.after[end]:
                if self._dominates(header, end):
                    bodies.setdefault(header, {header}).update(self._up_to(header, end))
        return [
            frozenset(body)
            for header, body in bodies.items()
            if not any(other in body for other in bodies if other != header)
        ]

    @staticmethod
    def _successors(i: int, instruction: Instruction, labels: dict[str, int], size: int) -> list[int]:
        name = instruction.opcode.split(".")[0]
        if name == "BRX":
            raise NotImplementedError("a jump table: its targets are not in the disassembly's text")
        jumps = name in ("BRA", "CALL", "JMP") and instruction.target is not None
        ends = name in ("BRA", "JMP", "EXIT", "RET") and instruction.always
        following = [] if ends or i + 1 == size else [i + 1]
        return following + ([labels[instruction.target]] if jumps and instruction.target in labels else [])

    def _postorder(self) -> list[int]:
        seen, order, stack = {0}, [], [(0, iter(self.after[0]))]
        while stack:
            node, rest = stack[-1]
            following = next((j for j in rest if j not in seen), None)
            if following is None:
                order.append(node)
                stack.pop()
            else:
                seen.add(following)
                stack.append((following, iter(self.after[following])))
        return order

    def _dominators(self, order: list[int]) -> dict[int, int]:
        """Immediate dominators, by Cooper, Harvey and Kennedy, "A Simple, Fast Dominance Algorithm" (2001)."""
        rank = {node: i for i, node in enumerate(order)}
        dominator = {0: 0}

        def meet(a: int, b: int) -> int:
            while a != b:
                a, b = (dominator[a], b) if rank[a] < rank[b] else (a, dominator[b])
            return a

        changed = True
        while changed:
            changed = False
            for node in reversed(order[:-1]):
                known = [p for p in self.before[node] if p in dominator]
                new = known[0]
                for other in known[1:]:
                    new = meet(new, other)
                changed |= dominator.get(node) != new
                dominator[node] = new
        return dominator

    def _dominates(self, a: int, b: int) -> bool:
        while b != a and b != self.dominator[b]:
            b = self.dominator[b]
        return a == b

    def _up_to(self, header: int, end: int) -> set[int]:
        """The loop's instructions that lead to `end` without passing `header` again."""
        body, stack = {header, end}, [end]
        while stack:
            node = stack.pop()
            if node != header:
                stack += [p for p in self.before[node] if p not in body]
                body.update(self.before[node])
        return body
