"""Model folders in repositories of the Hugging Face Hub.

They are loaded by `hf://USER/REPO` or `hf://USER/REPO@REVISION`. `huggingface_hub` must be
installed. It keeps downloads in its own cache, and reads its token and endpoint from its
environment variables.
"""

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from jaxvid import atomic, model_path
from jaxvid.errors import InputError, one_line
from jaxvid.storage import model_card

FILES = (model_card.CARD_NAME, "params/**")  # patterns of the files of a model folder
README = """---
library_name: jaxvid
pipeline_tag: video-classification
---

# {name}

A video classifier for jaxvid: {model}, {num_classes} classes.

```python
import jaxvid

classifier = jaxvid.Classifier("hf://{repo}")
print(classifier.predict("clip.mp4").labels[0])
```
"""


def download_repo(address: str) -> Path:
    """Download the model folder of a repository.

    Args:
        address: `hf://USER/REPO` or `hf://USER/REPO@REVISION`.

    Returns:
        The model folder in the cache of `huggingface_hub`.

    Raises:
        InputError: `huggingface_hub` is not installed; the address is invalid; the repository
            cannot be reached or contains no model folder.
    """
    match = re.fullmatch(r"hf://([\w.-]+/[\w.-]+?)/?(?:@(.+))?", address, re.IGNORECASE)
    if not match:
        raise InputError(f"{address}: expected hf://USER/REPO or hf://USER/REPO@REVISION")
    library = _import_library(address)
    with _converted_errors(address, "cannot be downloaded"):
        folder = library.snapshot_download(
            match[1], revision=match[2], allow_patterns=list(FILES), library_name="jaxvid"
        )
    if not model_path.exists(folder):
        raise InputError(
            f"{address} contains no model folder (no {model_card.CARD_NAME}); choose a repository "
            "that jaxvid.push_to_hub wrote"
        )
    return Path(folder)


def push_to_hub(folder: str | Path, repo: str, *, private: bool = False) -> str:
    """Upload a model folder to a repository, whose model is replaced if it has one.

    Args:
        folder: The model folder, written by training or by `save_model`.
        repo: Name of the repository, `USER/REPO`. It is created if it does not exist.
        private: Whether a new repository is private.

    Returns:
        The address for `load_model`, `hf://USER/REPO`.

    Raises:
        InputError: `folder` is not a model folder; `huggingface_hub` is not installed; or the
            repository cannot be written.
    """
    card = model_card.load_card(folder)
    repo = repo.removeprefix("hf://")
    library = _import_library(repo)
    with _converted_errors(repo, "cannot be written"):
        api = library.HfApi(library_name="jaxvid")
        api.create_repo(repo, private=private, exist_ok=True)
        if not api.file_exists(repo, "README.md"):
            text = README.format(
                name=repo.rpartition("/")[2],
                repo=repo,
                model=card["name"],
                num_classes=card["config"]["num_classes"],
            )
            api.upload_file(path_or_fileobj=text.encode(), path_in_repo="README.md", repo_id=repo)
        api.upload_folder(
            repo_id=repo,
            folder_path=atomic.resolve(folder, model_card.CARD_NAME),
            allow_patterns=list(FILES),
            delete_patterns="params/**",  # files of an earlier model
            commit_message=f"Upload {card['name']}",
        )
    return f"hf://{repo}"


def _import_library(address: str) -> ModuleType:
    """Import `huggingface_hub`.

    Raises:
        InputError: It is not installed.
    """
    try:
        import huggingface_hub
    except ImportError:
        raise InputError(
            f"{address}: needs huggingface_hub; install it with pip install huggingface_hub"
        ) from None
    return huggingface_hub


@contextlib.contextmanager
def _converted_errors(address: str, problem: str) -> Iterator[None]:
    """Convert any exception of `huggingface_hub` to an InputError."""
    try:
        yield
    except Exception as error:  # it has many exceptions of its own, and those of its HTTP client
        raise InputError(
            f"{address} {problem} ({type(error).__name__}: {one_line(error)}); check the name, the "
            "network, and your access rights (hf auth login)"
        ) from None
