"""The `data` section of a recipe."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from ...models.ranges import LEAST, PLACE, Allowed, below, number, or_nothing, whole
from .kinds import Path, PathOrNothing, Positive, Switch, Text, TextOrNothing, kind

SHARE = below(1, LEAST)
HELD_OUT = Allowed(f"{SHARE.words}, a text, or nothing", lambda x: SHARE.holds(x) or x is None or PLACE.holds(x))
HeldOut = kind(float | str | None, HELD_OUT)
Documents = kind(int | None, or_nothing(whole(2)))
Window = kind(int, whole(8))
CountOrNothing = kind(int | None, or_nothing(whole()))

DEFAULT_VALIDATION = 0.02


class Source(BaseModel):
    """One place that documents come from. What is left out here is taken from the fields of the same name in `data`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path  # `pydocs`, `pydocs-small`, a file, a folder, a glob, or a hub id `org/name[:config]`
    weight: Positive = 1.0  # share of the tokens of every step, relative to the other sources
    unit: Literal["window", "sentence"] = "window"  # sentence: windows begin and end where sentences do, one in each
    text_column: TextOrNothing = None
    split: TextOrNothing = None
    validation: HeldOut = None
    revision: TextOrNothing = None
    max_documents: Documents = None
    on_unreadable: Literal["stop", "skip"] | None = None


class DataRecipe(BaseModel):
    """What is read, how it is cut into tokens and windows.

    A source is one of
    - `pydocs`: the documentation that the installed Python carries (needs no network and no file); `pydocs-small`: that
      of its standard library and of the language alone, which is read in seconds;
    - a path or a glob of .txt (one document a file), .jsonl, .jsonl.gz and .parquet files, or a folder of them. When
      names in a folder begin with `train`, those are the training files, and those that begin with `validation`,
      `valid`, `val` or `dev` are held out;
    - a data set on the hub, `org/name` or `org/name:config`, read with `datasets`.

    Held out are, by `validation`: a number: about this fraction of the documents, chosen by a hash of their text; a
    text: these files (or, for a hub id, the split of this name). Left out: what the folder says, else 0.02. `pydocs`
    and `pydocs-small` have a fixed split of their own.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: list[Source] = Field([Source(path="pydocs")], min_length=1)  # also a single path, or a list of paths
    text_column: Text = "text"  # of jsonl, parquet and hub sources
    split: Text = "train"  # of hub sources
    validation: HeldOut = None
    revision: TextOrNothing = None  # of hub sources: a commit or tag; left out: the main branch when first read
    max_documents: Documents = None  # read no more than this of each source
    on_unreadable: Literal["stop", "skip"] = "stop"  # skip: a file that cannot be read ends there, and is counted
    tokenizer: Path = "pydocs"  # `pydocs`, `pydocs-small` (byte-level BPE trained on these), a folder, or a hub id
    vocab_size: kind(int, whole(300, 65536)) = 8192  # of the two `pydocs` tokenizers only
    window: Window = 512  # longest sequence in tokens; a longer document goes on in the next one
    # states of a frozen model.backbone are computed once for each window and stored, 16 bits a number, up to so many
    # 1e9 bytes; left out: computed in every step
    states_gb: kind(float | None, or_nothing(number(LEAST))) = None
    # left out: all text is tokenised before the run begins, and each epoch is drawn from all of it. Otherwise it is
    # read as the run needs it, so many megabytes of each step's mixture at a time, of which the windows are mixed, and
    # nothing is kept: for text that is too large for the disk, or is read no more than once
    stream_mb: kind(float | None, or_nothing(number(LEAST))) = None
    dedup: Switch = False  # of documents with the same text one stays, over all sources; what is held out goes first
    processes: CountOrNothing = None  # that tokenise; left out: one a core. The tokens do not depend on it
    cache: PathOrNothing = None  # folder; left out: $XDG_CACHE_HOME/conceptron, else ~/.cache/conceptron

    @field_validator("source", mode="before")
    @classmethod
    def _listed(cls, value: Any) -> Any:
        items = value if isinstance(value, list) else [value]
        return [{"path": item} if isinstance(item, str) else item for item in items]

    def sources(self) -> list[Source]:
        """The sources with every field filled in from `data`."""
        inherited = ("text_column", "split", "validation", "revision", "max_documents", "on_unreadable")
        return [
            source.model_copy(
                update={name: getattr(self, name) for name in inherited if getattr(source, name) is None}
            )
            for source in self.source
        ]
