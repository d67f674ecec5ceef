"""How checkpoints and transformers name a decoder's parameters."""

from typing import Literal, NamedTuple


class Names(NamedTuple):
    """How checkpoints and transformers name what our paths name.

    Attributes:
      decoder: the module that holds embedding, layers and norm.
      stored: where checkpoints keep it, where that has another name; else nothing.
      experts: how checkpoints keep experts: "each", three matrices for each; "joint", two for each; "fused", one tensor
        for gate_up_proj of all, and one for down_proj.
      modules: what stands differently in transformers' module names, inside a layer: (ours, theirs).
      files: what stands differently in checkpoints than in modules: (module's, file's), anywhere in a name.
      passed: beginnings of tensors of other parts (towers, heads for several tokens at once), which are never read and
        are passed on as they are.
    """

    decoder: str = "model"
    stored: str = ""
    experts: Literal["each", "fused", "joint"] = "each"
    modules: tuple[tuple[str, str], ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    passed: tuple[str, ...] = ()

    def module(self, path: str) -> str:
        """A path inside a layer as transformers has it."""
        for own, theirs in self.modules:
            path = path.replace(own, theirs)
        return path

    def file(self, name: str) -> str:
        """A tensor's name in checkpoints, of its name in transformers."""
        if self.stored and name.startswith(f"{self.decoder}."):
            name = self.stored + name.removeprefix(self.decoder)
        for module, file in self.files:
            name = name.replace(module, file)
        return name

    def passes(self, name: str) -> bool:
        """Whether a checkpoint's tensor is of another part of the model."""
        return name.startswith(self.passed)

    @property
    def embedding(self) -> str:
        """The embedding's name in checkpoints."""
        return self.file(f"{self.decoder}.embed_tokens.weight")

    @property
    def head(self) -> str:
        """The output layer's name in checkpoints."""
        return self.file("lm_head.weight")
