"""The documentation that every Python carries, one text file for each module of its library and topic of its language.

    python -m conceptron.engine.data.pydocs_files FOLDER

Of `pydocs` this is the part that needs no package installed; `make search` searches it.
"""

import sys
from pathlib import Path

from .pydocs import assemble, find_modules, language_topics, package_folders, parse


def write_files(folder: Path) -> int:
    """Writes FOLDER/MODULE.txt and FOLDER/topics/TOPIC.txt; returns their number. What is right stays."""
    modules = find_modules("", package_folders(())[""])
    found = zip(modules, parse([module.path for module in modules]), strict=True)
    documents = [*language_topics(), *((module.name, sections) for module, sections in found if sections)]
    texts, _ = assemble(documents)
    for name, text in texts:
        file = folder / f"{name.replace('python topic ', 'topics/')}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.is_file() or file.read_text(encoding="utf-8") != text:
            file.write_text(text, encoding="utf-8")
    return len(texts)


if __name__ == "__main__":
    print(f"{write_files(Path(sys.argv[1]))} files in {sys.argv[1]}")
