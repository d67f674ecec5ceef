"""What reading adapters has shown: the content of each version, or why it cannot be served."""

from pathlib import Path
from typing import NamedTuple

from qlora_jax.serve.adapters.reading import Fingerprint, fingerprint
from qlora_jax.serve.request import Refused

# Versions that are remembered beside those that a request waits for; one that was forgotten is read again.
MOST = 4096


class Version(NamedTuple):
    """An adapter as its files were at one moment."""

    folder: Path
    seen: Fingerprint

    @classmethod
    def of(cls, folder: Path) -> "Version":
        """The one that is there now."""
        return cls(folder, fingerprint(folder))


class Known:
    """At most one version of a folder, and MOST in all, beside those in use. Not thread-safe.

    Attributes:
      names: under which name a folder was asked for last.
    """

    def __init__(self) -> None:
        self.names: dict[Path, str] = {}
        self._found: dict[Version, str | Refused] = {}  # the one that was learnt longest ago first

    def __len__(self) -> int:
        return len(self._found)

    def key(self, version: Version) -> str | None:
        """The content hash; None where the version has not been read, or is refused."""
        found = self._found.get(version)
        return None if isinstance(found, Refused) else found

    def refusal(self, version: Version) -> Refused | None:
        """Why it cannot be served."""
        found = self._found.get(version)
        return found if isinstance(found, Refused) else None

    def learn(self, version: Version, found: str | Refused, used: set[Version]) -> None:
        """Notes what a version is, and forgets what nobody asks for any more; those in `used` are asked for."""
        self._found.pop(version, None)
        for other in list(self._found):
            if other not in used and (other.folder == version.folder or len(self._found) >= MOST):
                self._forget(other)
        self._found[version] = found
        self.names.setdefault(version.folder, version.folder.name)

    def forget_passing(self, used: set[Version]) -> None:
        """Forgets refusals that another attempt may not meet: a disk's error, a folder that was being written."""
        for version, found in list(self._found.items()):
            if isinstance(found, Refused) and version not in used and not _lasts(found):
                self._forget(version)

    def name_of_key(self, key: str) -> str:
        """Under which name this content was asked for; empty where its version is forgotten."""
        return next((self.names.get(v.folder, "") for v, found in self._found.items() if found == key), "")

    def broken(self) -> dict[str, str]:
        """The adapters that cannot be served as their files are now, by name, with the reason."""
        refused = [(version, found) for version, found in self._found.items() if isinstance(found, Refused)]
        return {self.names[v.folder]: str(found) for v, found in refused if v == Version.of(v.folder)}

    def _forget(self, version: Version) -> None:
        del self._found[version]
        if all(other.folder != version.folder for other in self._found):
            self.names.pop(version.folder, None)


def _lasts(refusal: Refused) -> bool:
    """Whether it stands as long as the files are what they are."""
    return isinstance(refusal.__cause__, ValueError | NotImplementedError)
