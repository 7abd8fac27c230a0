"""Who may import whom: the six files of the method from left to right, lib/ below them, tools/ above them."""

import ast
from graphlib import TopologicalSorter

from conftest import ROOT

METHOD = ["rewards", "data", "model", "grpo", "eval", "train"]  # each may import those before it, and lib
ABOVE_DATA = {"lib.answers", "lib.loader", "lib.questions", "lib.sharding", "lib.toy"}  # the rest of lib does not know data.py
LEFT_ALONE = {("grpo", "rewards"), ("grpo", "lib.lora")}  # a group is scored by a function, and a model knows its reference
# Inside a function only what some machines do not have, or what is slow to import and rarely needed.
IN_FUNCTIONS = {"av", "decord", "PIL", "resource", "tokenizers", "torch", "transformers"}

FILES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
         for folder in (".", "lib", "tools") for path in (ROOT / folder).glob("*.py")}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}


def imports(*nodes: ast.AST) -> set[str]:
    """The modules that the code under `nodes` imports; of `from lib import x` lib.x."""
    found = set()
    for part in (part for node in nodes for part in ast.walk(node)):
        if isinstance(part, ast.Import):
            found |= {alias.name for alias in part.names}
        elif isinstance(part, ast.ImportFrom):
            found |= {f"{part.module}.{alias.name}" for alias in part.names} & FILES.keys() or {part.module}
    return found


# Without the last lines of a file, `if __name__ == "__main__"`: there a command hands over to its tool.
IMPORTS = {name: imports(*(node for node in tree.body if not isinstance(node, ast.If))) & FILES.keys()
           for name, tree in TREES.items()}
INSIDE = {name: imports(*(node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)))
          for name, tree in TREES.items()}


def may_import(name: str, other: str) -> bool:
    if name.startswith("tools."):
        return True
    if other.startswith("tools."):
        return name == "train" and other in INSIDE[name]
    if name.startswith("lib."):
        return other.startswith("lib.") or other == "rewards" or (other == "data" and name in ABOVE_DATA)
    return (other.startswith("lib.") or METHOD.index(other) < METHOD.index(name)) and (name, other) not in LEFT_ALONE


def test_only_the_six_files_of_the_method_stand_at_the_top():
    assert sorted(name for name in FILES if "." not in name) == sorted(METHOD)


def test_every_file_imports_what_is_below_it():
    assert not {(name, other) for name, others in IMPORTS.items() for other in others if not may_import(name, other)}


def test_there_is_no_circle_and_no_import_inside_a_function_to_dodge_one():
    TopologicalSorter({name: {other for other in others if (name, other[:6]) != ("train", "tools.")}
                       for name, others in IMPORTS.items()}).prepare()  # raises CycleError
    for name, modules in INSIDE.items():
        unknown = {module for module in modules if module.partition(".")[0] not in IN_FUNCTIONS}
        assert all(name == "train" and module.startswith("tools.") for module in unknown), (name, unknown)


def test_what_is_loaded_is_never_run():
    """A checkpoint of the hub may bring code of its own, and a pickle is code: neither is run. (The workers' pipe has our own.)"""
    for name, tree in TREES.items():
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            told, text = {word.arg: ast.unparse(word.value) for word in call.keywords}, ast.unparse(call.func)
            if text.startswith("Auto") and call.func.attr == "from_pretrained":
                assert told.get("trust_remote_code") == "False", (name, call.lineno)
            assert text != "torch.load" or told.get("weights_only") == "True", (name, call.lineno)
            assert call.func.attr not in ("load", "loads") or text != f"pickle.{call.func.attr}" or name == "lib.loader"
            assert "FileSystemReader" not in text, (name, call.lineno)  # lib.checkpoints.Reader
