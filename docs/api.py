"""Makes docs/api.md, the reference of everything public, from the docstrings.

python docs/api.py
"""

import inspect
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import samlite


def main() -> None:
    Path(__file__).with_name("api.md").write_text(reference(), encoding="utf-8")


def reference() -> str:
    """The whole page."""
    lines = [
        "# Reference",
        "",
        f"`samlite` {samlite.__version__}, made from the docstrings by `python docs/api.py`.",
        "",
    ]
    for name in samlite.__all__:
        if name != "__version__":
            lines += _of_class(name, getattr(samlite, name))
    return "\n".join(lines).rstrip() + "\n"


def _of_class(name: str, cls: Any) -> list[str]:
    lines = [f"## {name}", ""]
    if is_dataclass(cls):
        names = ", ".join(f"`{field.name}`" for field in fields(cls))
        return [*lines, *_text(cls), f"Fields: {names}.", ""]
    lines += [f"`samlite.{name}{_signature(cls.__init__)}`", "", *_text(cls)]
    for base in reversed([each for each in cls.__mro__ if each.__module__.startswith("samlite")]):
        for method, function in vars(base).items():
            own = getattr(cls, method, None)
            if not method.startswith("_") and inspect.isfunction(function) and own is function:
                lines += [f"### {name}.{method}", "", f"`{method}{_signature(function)}`", "", *_text(function)]
    return lines


def _signature(function: Any) -> str:
    signature = inspect.signature(function)
    parameters = [
        each.replace(annotation=inspect.Parameter.empty)
        for each in signature.parameters.values()
        if each.name != "self"
    ]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def _text(documented: Any) -> list[str]:
    """A docstring as Markdown: what it indents is shown as it is."""
    text = inspect.getdoc(documented) or ""
    sections: list[str] = []
    fenced = False
    for line in text.replace("::\n", "\n").splitlines():
        deeper = line.startswith("    ") or (fenced and not line.strip())
        if deeper != fenced:
            sections.append("```text" if deeper else "```")
            fenced = deeper
        sections.append(line.removeprefix("    ") if deeper else line.replace("``", "`"))
    return [*sections, *["```"] * fenced, ""]


if __name__ == "__main__":
    main()
