"""Storage behind an fsspec URL: `memory://`, `s3://`, `gs://`... Imported by `checkpoint.storage` for such URLs only.

Object stores cannot rename, so `publish` is one PUT, which they make visible whole or not at all. `create` uploads in
parts as it is written; the object appears at `close`.
"""

import contextlib
from typing import Any

import fsspec
import numpy as np

from checkpoint.storage import Bytes, Sink, as_memory, explain
from collectives.errors import CorruptFile, RingholdError, StorageFailed


class Remote:
    """A folder behind a URL."""

    def __init__(self, url: str) -> None:
        try:
            self._files, self._root = fsspec.core.url_to_fs(url.rstrip("/"))
        except (ValueError, ImportError) as error:
            raise StorageFailed(f"cannot open {url}: {error}") from None
        self._url = url.rstrip("/")

    @property
    def url(self) -> str:
        """The URL as given."""
        return self._url

    def read(self, name: str, limit: int) -> bytes:
        """All of a file."""
        with self._telling(f"read {self._url}/{name}"):
            data: bytes = self._files.cat_file(self._path(name), start=0, end=limit + 1)
        if len(data) > limit:
            raise CorruptFile(f"{self._url}/{name} has more than {limit} bytes, which no such file has")
        return data

    def read_into(self, name: str, start: int, out: Bytes) -> None:
        """Fill `out` by one ranged read."""
        with self._telling(f"read {self._url}/{name}"):
            data = self._files.cat_file(self._path(name), start=start, end=start + len(out))
        if len(data) != len(out):
            raise CorruptFile(f"{self._url}/{name} ends at byte {start + len(data)}, before byte {start + len(out)}")
        out[:] = np.frombuffer(data, dtype=np.uint8)

    def size(self, name: str) -> int:
        """Bytes of a file."""
        with self._telling(f"look at {self._url}/{name}"):
            self._files.invalidate_cache()
            return int(self._files.size(self._path(name)))

    def names(self, folder: str) -> list[str]:
        """Files right in a folder."""
        self._files.invalidate_cache()
        with self._telling(f"list {self._url}/{folder}"):
            try:
                rows = self._files.ls(self._path(folder), detail=True)
            except FileNotFoundError:
                return []
        return sorted(
            row["name"].rpartition("/")[2] for row in rows if row["type"] == "file" and row["name"][-1] != "/"
        )

    def create(self, name: str) -> Sink:
        """Begin an upload."""
        doing = f"write {self._url}/{name}"
        with self._telling(doing):
            self._make_parent(name)
            return _RemoteSink(self, self._files.open(self._path(name), "wb"), doing)

    def publish(self, name: str, data: bytes, durable: bool = True) -> None:
        """One PUT, which is durable anyhow."""
        with self._telling(f"write {self._url}/{name}"):
            self._make_parent(name)
            self._files.pipe_file(self._path(name), data)

    def remove(self, name: str) -> None:
        """Remove a file."""
        with self._telling(f"remove {self._url}/{name}"), contextlib.suppress(FileNotFoundError):
            self._files.rm_file(self._path(name))

    def close(self) -> None:
        """Nothing is kept open."""

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}" if self._root else name

    def _make_parent(self, name: str) -> None:
        """Folders, where the file system has such a thing; object stores ignore it."""
        parent = self._path(name).rpartition("/")[0]
        if "s3" not in self._protocols() and parent:
            self._files.makedirs(parent, exist_ok=True)

    def _protocols(self) -> tuple[str, ...]:
        protocol = self._files.protocol
        return (protocol,) if isinstance(protocol, str) else tuple(protocol)

    @contextlib.contextmanager
    def _telling(self, doing: str) -> Any:
        """Whatever a library raises is told as `StorageFailed`: every one has errors of its own kind."""
        try:
            yield
        except RingholdError:
            raise
        except Exception as error:
            raise explain(error, doing) from error


class _RemoteSink:
    def __init__(self, owner: Remote, file: Any, doing: str) -> None:
        self._owner, self._file, self._doing = owner, file, doing

    def write(self, data: Bytes | bytes) -> None:
        with self._owner._telling(self._doing):
            self._file.write(as_memory(data))

    def close(self) -> None:
        with self._owner._telling(self._doing):
            self._file.close()

    def abandon(self) -> None:
        with contextlib.suppress(Exception):
            self._file.discard()
        with contextlib.suppress(Exception):
            self._file.closed = True
