"""What is known of a reward model, in JSON files that lie beside its weights and go where they go."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ValidationError

from rlhf_ray.failures import BadInput


class BesideWeights(BaseModel):
    """The content of such a file.

    Attributes:
        FILE_NAME: in the model's directory.
        MEANING: what a file that cannot be read is not.
        INDENT: of the file; None for one line.
    """

    FILE_NAME: ClassVar[str]
    MEANING: ClassVar[str]
    INDENT: ClassVar[int | None] = None

    def save(self, folder: Path) -> None:
        """Write it beside the weights; a reader meets the old or the new file, never a part."""
        temporary = folder / f".{self.FILE_NAME}"
        temporary.write_text(self.model_dump_json(indent=self.INDENT) + "\n", encoding="utf-8")
        temporary.replace(folder / self.FILE_NAME)

    @classmethod
    def load(cls, model: str, key: str) -> Self | None:
        """The file of a model's directory; none for a model that was trained elsewhere.

        Args:
            key: the setting that names the directory.

        Raises:
            BadInput: there is a file that cannot be read.
        """
        path = Path(model) / cls.FILE_NAME
        if not path.is_file():
            return None
        try:
            return cls.model_validate_json(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            cause = str(error)
        except ValidationError as error:
            first = error.errors()[0]
            cause = f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}".removeprefix(": ")
        raise BadInput(key, f"'{path}' is not {cls.MEANING} ({cause})", "the file that train-rm wrote")
