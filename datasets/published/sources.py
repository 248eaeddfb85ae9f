"""Sources of published data: files in the user's folders, or downloads; always checked, never silently replaced."""

from __future__ import annotations

import gzip
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fedveil.core.catalog import DATASETS
from fedveil.core.errors import DataError
from fedveil.core.foreign import reading
from fedveil.datasets.published.downloads import Digest, digest, download, enron_lines, from_zip, store, written_into


@dataclass(frozen=True)
class KnownFile:
    """A published file.

    path: inside the data folder; a .gz file may also be there unpacked, without that ending
    content: the digest of the file, unpacked
    packed: the digest of the .gz file as published; another .gz file with the same content is accepted too
    """

    path: str
    content: Digest
    packed: Digest | None = None

    @property
    def name(self) -> str:
        """The file's name, unpacked."""
        return Path(self.path).name.removesuffix(".gz")

    @property
    def variants(self) -> tuple[str, ...]:
        """The paths that the file may have."""
        return (self.path, self.path.removesuffix(".gz")) if self.packed else (self.path,)


KNOWN: dict[str, tuple[KnownFile, ...]] = {
    "mnist": (
        KnownFile(
            "mnist/train-images-idx3-ubyte.gz",
            Digest(47040016, "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db"),
            Digest(9912422, "440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609"),
        ),
        KnownFile(
            "mnist/train-labels-idx1-ubyte.gz",
            Digest(60008, "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5"),
            Digest(28881, "3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c"),
        ),
        KnownFile(
            "mnist/t10k-images-idx3-ubyte.gz",
            Digest(7840016, "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7"),
            Digest(1648877, "8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6"),
        ),
        KnownFile(
            "mnist/t10k-labels-idx1-ubyte.gz",
            Digest(10008, "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
            Digest(4542, "f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6"),
        ),
    ),
    "sms": (
        KnownFile(
            "sms/SMSSpamCollection",
            Digest(477907, "7d039a24a6083ed9ef0f806ebad56bbb976e3aeb8de05669173bfdc4996c239d"),
        ),
    ),
    "enron": (
        KnownFile(
            "enron/ham.txt.gz",
            Digest(5774419, "101de57303735c1cc16cd8258e5119f9feeecd40044e19559dc3f6f747cbff74"),
            Digest(1423386, "2782f9b670155ca09bbc1b09628fe2b39f127c80a19a6f0176e62e3279db7392"),
        ),
        KnownFile(
            "enron/spam.txt.gz",
            Digest(6711818, "f86e3f3faa1bef41e8f2c5e561fc1d7d9567306611b3b13175a4f8b0a559c523"),
            Digest(2098326, "2c2151c4fc2e0b0d99e74de0e43d25ea5a93bef116d944bc292bf8bccf7a02b4"),
        ),
    ),
}

# MNIST: LeCun et al. 1998, PyTorch's mirror. SMS: Almeida et al. 2011. Enron-Spam: Metsis et al. 2006.
URLS: dict[str, tuple[str, ...]] = {
    "mnist": tuple(f"https://ossci-datasets.s3.amazonaws.com/{file.path}" for file in KNOWN["mnist"]),
    "sms": ("https://archive.ics.uci.edu/static/public/228/sms+spam+collection.zip",),
    "enron": tuple(
        f"http://www2.aueb.gr/users/ion/data/enron-spam/preprocessed/{part}.tar.gz" for part in ("enron1", "enron5")
    ),
}


class FileStatus(NamedTuple):
    """The location of a known file; `found` and `size` (bytes) are None where it is not on this machine."""

    dataset: str
    file: str
    found: Path | None
    size: int | None


class FileCheck(NamedTuple):
    """The check of a known file; `problem` is empty where the file is the published one."""

    file: str
    found: Path | None
    problem: str


def cache_folder() -> Path:
    """Return the folder of downloads: `$FEDVEIL_CACHE/data`, else in the user's cache folder."""
    root = os.environ.get("FEDVEIL_CACHE")
    if root:
        return Path(root).expanduser() / "data"
    import platformdirs

    return Path(platformdirs.user_cache_dir("fedveil")) / "data"


def folders() -> list[Path]:
    """Return the folders in which data is searched, in order: `$FEDVEIL_DATA`, then the cache."""
    own = os.environ.get("FEDVEIL_DATA")
    return [*([Path(own).expanduser()] if own else []), cache_folder()]


def find(dataset: str) -> dict[str, Path]:
    """Return the files of a data set by name (`{"ham.txt": .../ham.txt.gz}`); download missing ones to the cache.

    A data set that needs no files has none. Raise DataError where a file is not the published one, or is missing and
    cannot be downloaded; SettingsError where there is no such data set.
    """
    known = KNOWN.get(DATASETS.check(dataset, "data.dataset"), ())
    missing = [file for file in known if _locate(file) is None]
    if missing:
        _download(dataset, missing)
    paths = {}
    for file in known:
        path = _locate(file)
        if path is None:
            raise DataError(f"{file.path} was there a moment ago and is gone from {cache_folder()}")
        problem = _problem(path, file)
        if problem:
            raise DataError(f"{problem}; remove it and it is downloaded again, or put the published file there")
        paths[file.name] = path
    return paths


def status() -> list[FileStatus]:
    """Return the location of every known file; nothing is downloaded or checked."""
    found = [(dataset, file, _locate(file)) for dataset, files in KNOWN.items() for file in files]
    return [FileStatus(name, file.path, path, path.stat().st_size if path else None) for name, file, path in found]


def check(dataset: str) -> list[FileCheck]:
    """Check whether each file of a data set is the published one; nothing is downloaded."""
    results = []
    for file in KNOWN.get(DATASETS.check(dataset, "data.dataset"), ()):
        path = _locate(file)
        problem = (
            f"{file.path} is missing; looked in {', '.join(map(str, folders()))}"
            if path is None
            else _problem(path, file)
        )
        results.append(FileCheck(file.path, path, problem))
    return results


def _locate(file: KnownFile) -> Path | None:
    candidates = (folder / variant for folder in folders() for variant in file.variants)
    return next((path for path in candidates if path.is_file()), None)


def _problem(path: Path, file: KnownFile) -> str:
    """Say what is wrong with the file at `path`; an empty string where nothing is."""
    try:
        with path.open("rb") as stream:
            found = digest(stream)
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}"
    packed = file.packed if path.name.endswith(".gz") else None
    if found == (packed or file.content) or (packed and _unpacked(path) == file.content):
        return ""
    return f"{path} is not the published file: expected {packed or file.content}, found {found}"


def _unpacked(path: Path) -> Digest | None:
    """Return the digest of a .gz file's content; None where it cannot be unpacked."""
    try:
        with reading(DataError), gzip.open(path, "rb") as stream:
            return digest(stream)
    except DataError:
        return None


def _download(dataset: str, missing: list[KnownFile]) -> None:
    """Download the missing files to the cache; raise DataError, with what the user can do, where that fails."""
    try:
        {"mnist": _download_mnist, "sms": _download_sms, "enron": _download_enron}[dataset](missing)
    except DataError as error:
        names = ", ".join(file.path for file in missing)
        unpacked = " (unpacked ones do too)" if any(len(file.variants) > 1 for file in missing) else ""
        looked = ", ".join(str(folder / dataset) for folder in folders())
        raise DataError(
            f"data set '{dataset}' is not on this machine, and the download failed\n"
            f"  missing   {names}{unpacked}\n"
            f"  looked in {looked}\n"
            f"  tried     {error}\n"
            f"  to go on  put the files into {folders()[0] / dataset}, or set FEDVEIL_DATA (or --data-dir) to the folder "
            f"that holds {dataset}/\n"
            f"  published at {', '.join(URLS[dataset])}"
        ) from None


def _download_mnist(missing: list[KnownFile]) -> None:
    for file, url in zip(KNOWN["mnist"], URLS["mnist"], strict=True):
        if file in missing:
            download(url, cache_folder() / file.path, (file.packed or file.content).sha256)


def _download_sms(missing: list[KnownFile]) -> None:
    (url,) = URLS["sms"]
    with _archive(url) as archive:
        for file in missing:
            content = from_zip(archive, file.name, url)
            _check_made(f"{file.name} of {url}", content, file)
            store(cache_folder() / file.path, content)


def _download_enron(missing: list[KnownFile]) -> None:
    """Write each message of the archives as a line of ham.txt or spam.txt, those of enron1 first, then enron5's."""
    lines: dict[str, list[bytes]] = {"ham": [], "spam": []}
    for url in URLS["enron"]:
        with _archive(url) as archive:
            for label, more in enron_lines(archive, url).items():
                lines[label] += more
    for file in missing:
        text = b"".join(lines[file.name.removesuffix(".txt")])
        _check_made(f"{file.name} as made from {' and '.join(URLS['enron'])}", text, file)
        store(cache_folder() / file.path, gzip.compress(text, mtime=0))


@contextmanager
def _archive(url: str) -> Iterator[Path]:
    """Download an archive, whose digest is not known, to a file that is deleted afterwards."""
    with written_into(cache_folder()):
        folder = tempfile.TemporaryDirectory(dir=cache_folder())
    with folder as name:
        archive = Path(name, "archive")
        download(url, archive, None)
        yield archive


def _check_made(source: str, content: bytes, file: KnownFile) -> None:
    if digest(content) != file.content:
        raise DataError(f"{source}: not the published file: expected {file.content}, found {digest(content)}")
