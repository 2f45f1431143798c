"""Files that are written whole or not at all, and tensors in them, without pickles."""

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vitrail.errors import BadInput, first_of
from vitrail.vit.config import shorten

Shapes = Mapping[str, tuple[int, ...]]  # of weights, by their names

HINTING = 256  # bytes at the beginning of a file that tell what it is
MOST_JSON = 1 << 25  # bytes: the names of ImageNet-21k's classes take a thirtieth of it


def make_folder(path: Path) -> None:
    """Make a folder, and those that it is to lie in.

    Raises:
        BadInput: one of these is a file.
        OSError: it cannot be made.
    """
    _check_folders(path)
    path.mkdir(parents=True, exist_ok=True)


def check_place(path: Path) -> None:
    """See to it that a new folder can lie there, before there is anything to write into it.

    Raises:
        BadInput: the path has no last name, or would lie in a file.
    """
    if path.name in ("", ".."):
        raise BadInput(f"{path} is no name for a new folder; name one with --output, such as runs/NAME.")
    _check_folders(path.parent)


def _check_folders(path: Path) -> None:
    for each in (path, *path.parents):
        if each.exists() and not each.is_dir():
            raise BadInput(f"{each} is a file, and nothing can lie in it; name another folder with --output.")


def write(path: Path, save: Callable[[Path], object]) -> None:
    """Have `save` write a file beside `path`, then put it in its place in one step that cannot be interrupted.

    Raises:
        BadInput: it would lie below a file.
        OSError: it could not be written (no space left, say); what stood at `path` is as it was.
    """
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save(partial)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file in one step."""
    write(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def write_tensors(
    path: Path,
    tensors: dict[str, Tensor],
    about: dict[str, Any] | None = None,
    metadata: dict[str, str] | None = None,
) -> None:
    """Write tensors in one step, with `about` as JSON in the header, or with the one key that `metadata` has. The same
    tensors give the same bytes."""
    # One key only: safetensors writes several in no fixed order.
    metadata = {"about": json.dumps(about, sort_keys=True)} if about is not None else metadata

    def save(partial: Path) -> None:
        partial.touch()
        mode = partial.stat().st_mode  # as the umask has it; safetensors gives its files to their owner alone
        try:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, partial, metadata)
        except SafetensorError as error:  # its way of saying that the disk is full
            raise OSError(f"could not write {path}: {error}") from error
        partial.chmod(mode)

    write(path, save)


@contextmanager
def reachable(path: Path) -> Iterator[None]:
    """Look for what is in a file or folder, and say of which it was that the system would not tell.

    Raises:
        BadInput: the name is too long, say, or others may not look into it.
    """
    try:
        yield
    except OSError as error:
        raise BadInput(f"{path} cannot be opened: {(error.strerror or str(error)).lower()}.") from None


def check_plain(path: Path) -> None:
    """See to it that a file is one that can be read from its beginning to its end; a pipe would be waited for.

    Raises:
        BadInput: it is missing, or something else, such as a folder.
    """
    with reachable(path):
        if not path.is_file():
            raise BadInput(f"{path} is {'no regular file' if path.exists() else 'missing'}.")


def no_safetensors(path: Path, error: Exception) -> BadInput:
    """What is said of a file that cannot be read as safetensors, for that reason."""
    hint = instead(path) if isinstance(error, SafetensorError) else ""
    return BadInput(f"{path} cannot be read as safetensors: {error}.{hint}")


def instead(path: Path) -> str:
    """What a file may be that is not read as weights, by how it begins, and what to do; behind the reason."""
    try:
        with path.open("rb") as file:
            begin = file.read(HINTING)
    except OSError:
        return ""
    if not begin:
        return " It is empty: fetch or save it again."
    if begin.startswith(b"version https://git-lfs"):
        return " It is a pointer of Git LFS to the file: `git lfs pull` fetches that."
    if begin[8:9] != b"{":  # as safetensors have it, behind a length of any bytes
        if re.match(rb"\x80[\x02-\x05]", begin) or b"/data.pkl" in begin:
            return (
                " It is a pickle, which may run any program when it is opened; Vitrail never does. If you trust it, "
                "save what is in it as safetensors."
            )
        if re.match(rb"\s*<[!?a-zA-Z]", begin):
            return " It is a web page: fetch the file itself."
    return " It may have been cut off: if it was fetched or copied, do that again."


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of a file, and what was said `about` them.

    Raises:
        BadInput: there is no such file, or it is damaged.
    """
    with _opened(path) as file:
        about = json.loads((file.metadata() or {}).get("about", "{}"))
        names = file.keys()  # of something that is no dict
        return {name: torch.from_numpy(file.get_tensor(name)) for name in names}, about


def read_shapes(path: Path) -> Shapes:
    """The shapes of the tensors of a file, of which nothing else is read.

    Raises:
        BadInput: as `read_tensors`.
    """
    with _opened(path) as file:
        names = file.keys()
        return {name: tuple(file.get_slice(name).get_shape()) for name in names}


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    check_plain(path)
    try:
        # For PyTorch it would open the file a second time, which a running training may have replaced meanwhile.
        with safe_open(path, framework="np") as file:
            yield file
    except (SafetensorError, OSError, ValueError, TypeError, RecursionError) as error:  # NumPy has no bfloat16
        raise no_safetensors(path, error) from None


def read_about(path: Path) -> dict[str, Any]:
    """What was said `about` the tensors of a file, which are not read.

    Raises:
        BadInput: the file is damaged.
    """
    try:
        with safe_open(path, framework="np") as file:
            return json.loads((file.metadata() or {})["about"])
    except (SafetensorError, OSError, ValueError, KeyError, RecursionError) as error:
        raise BadInput(f"{path} is damaged: {error}.") from None


def read_json(path: Path) -> dict[str, Any]:
    """What a JSON file says by name.

    Raises:
        BadInput: it is missing, damaged or too large, or holds something else.
    """
    check_plain(path)
    try:
        if (size := path.stat().st_size) > MOST_JSON:
            raise BadInput(f"{path} has {size:,} bytes: it is not read.")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError, RecursionError) as error:
        raise BadInput(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds {shorten(content)}, and no settings by name.")
    return content


def check_weights(expected: dict[str, Tensor], found: dict[str, Tensor], path: Path) -> None:
    """Compare the names, shapes and types of weights, and see whether all of them are numbers.

    Raises:
        BadInput: some are missing, unexpected or misshapen, of another type, or NaN or infinite; the message names
            them.
    """
    check_shapes(expected, found, path)
    for name, tensor in found.items():
        if tensor.dtype != expected[name].dtype:
            raise BadInput(f"{path} has {name} of {tensor.dtype}; it must be of {expected[name].dtype}.")
    if broken := [name for name, tensor in found.items() if not tensor.isfinite().all()]:
        raise BadInput(f"the weights of {path} are broken: {first_of(broken, 3)} have NaN or infinite values.")


def check_shapes(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], path: Path) -> None:
    """Compare the names and shapes of weights.

    Raises:
        BadInput: as `compare_shapes`.
    """
    compare_shapes(shapes_of(expected), shapes_of(found), path)


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shapes of tensors."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def compare_shapes(expected: Shapes, found: Shapes, path: Path) -> None:
    """Compare what weights are called, and the shapes that they have, with what a model wants.

    Raises:
        BadInput: some are missing, unexpected or misshapen; the message lists them.
    """
    problems = [f"{name} is missing" for name in expected if name not in found]
    problems += [f"{name} is unexpected" for name in found if name not in expected]
    problems += [
        f"{name} has shape {shorten(found[name])} instead of {shape}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    if problems:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise BadInput(f"the weights of {path} are not this model's: {'; '.join(problems[:8])}{more}.")
