"""Programs and plans as JSON; writes version 2, reads version 1 too.

The formats are ``autoremat-program`` and ``autoremat-plan``.

``docs/program-file.md`` describes the files. Fields that have their default are left out; unknown fields are ignored,
so that a file with later extensions can still be read. Everything that is known is checked, and what is wrong is
named by op or value and field.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final, TypeVar, get_args

from autoremat.program.abilities import Abilities, Reruns
from autoremat.program.errors import InvalidProgram, InvalidSchedule
from autoremat.program.files import write_text
from autoremat.program.link import Link
from autoremat.program.model import END, INSIDE, Kind, Op, Program, Value, abilities_of
from autoremat.program.once import Once, Reason
from autoremat.program.plan import Plan
from autoremat.program.repeats import Layout, Repeated, unfold
from autoremat.program.schedule import Offload, Schedule

PROGRAM_FORMAT: Final = "autoremat-program"
PLAN_FORMAT: Final = "autoremat-plan"
VERSION: Final = 2
"""That is written. Version 1 had ``repeatable``, a sentence, in place of ``once``, ``note`` and ``kind``."""

_LARGEST: Final = 2**63 - 1

_T = TypeVar("_T")
_REQUIRED: Final = object()
_OFFLOAD: Final = ("value", "send", "gone", "fetch", "here")
_CANDIDATE: Final = ("solver", "peak_bytes", "overhead")
_KINDS: Final[dict[type, str]] = {
    str: "a string",
    int: "an integer",
    bool: "true or false",
    list: "a list",
    dict: "an object",
}

_OP_DEFAULTS: Final[dict[str, object]] = {
    "seconds": 0.0,
    "scratch_bytes": 0,
    "phase": "forward",
    "once": "",
    "note": "",
    "kind": "op",
    "in_place": {},
    "module": "",
    "source": "",
    "call": -1,
    "rerun_seconds": None,
    "rerun_scratch_bytes": None,
}

_VALUE_DEFAULTS: Final[dict[str, object]] = {
    "fixed": False,
    "held": None,
    "label": "",
    "kind": "",
    "dtype": "",
    "shape": None,
    "module": "",
    "available": None,
    "passing": False,
}

# --- Writing ----------------------------------------------------------------------------------------------------------


def program_to_data(program: Program) -> dict[str, Any]:
    """Turn the program into JSON data, without fields that have their default."""
    ids = [v.id for v in program.values]
    return {
        "format": PROGRAM_FORMAT,
        "version": VERSION,
        "name": program.name,
        **_unless(
            {
                "timing": program.timing,
                "measured_share": program.measured_share,
                "recorded": program.recorded,
                "abilities": asdict(program.abilities),
                "link": None if program.link is None else asdict(program.link),
            },
            abilities=asdict(abilities_of(program.ops)),
            timing="given",
            measured_share=float(program.timing == "measured"),
            recorded="",
            link=None,
        ),
        "values": [_value_to_data(v) for v in program.values],
        "ops": [_op_to_data(op, ids) for op in program.ops],
    }


def repeated_to_data(folded: Repeated) -> dict[str, Any]:
    """Turn a folded program into JSON data.

    Its few repetitions are a program, and ``repeats`` says where they stand.
    """
    data, layout = program_to_data(folded.program), folded.layout
    repeats = {"times": folded.times, "count": layout.count, "forward": [*layout.forward]}
    return data | {"repeats": repeats | {"backward": [*layout.backward]}}


def plan_to_data(plan: Plan) -> dict[str, Any]:
    """Turn the plan and its program into JSON data.

    The frees name values by id.
    """
    ids = [v.id for v in plan.program.values]
    candidates = [[name, int(peak), float(overhead)] for name, peak, overhead in plan.candidates]
    return {
        "format": PLAN_FORMAT,
        "version": VERSION,
        "budget_bytes": int(plan.budget_bytes),
        "peak_bytes": int(plan.peak_bytes),
        "plain_peak_bytes": int(plan.plain_peak_bytes),
        "floor_bytes": int(plan.floor_bytes),
        **_unless({"floor_lower_bound_bytes": int(plan.floor_lower_bound_bytes)}, floor_lower_bound_bytes=0),
        "overhead": float(plan.overhead),
        "lower_bound": float(plan.lower_bound),
        "solver": plan.solver,
        **_unless({"stopped": plan.stopped}, stopped=""),
        **_unless({"plain_seconds": float(plan.plain_seconds)}, plain_seconds=0.0),
        **_unless({"candidates": candidates}, candidates=[]),
        "order": [int(i) for i in plan.schedule.order],
        "frees": [[ids[v] for v in frees] for frees in plan.schedule.frees],
        **_unless({"offloads": [_offload_to_data(o, ids) for o in plan.schedule.offloads]}, offloads=[]),
        "program": program_to_data(plan.program),
    }


def _offload_to_data(offload: Offload, ids: Sequence[str]) -> list[Any]:
    return [ids[offload.value], offload.send, offload.gone, offload.fetch, offload.here]


def _value_to_data(value: Value) -> dict[str, Any]:
    optional: dict[str, Any] = {"fixed": value.fixed, "held": "end" if value.held == END else value.held}
    optional |= {"label": value.label, "kind": value.kind, "dtype": value.dtype}
    optional |= {"shape": None if value.shape is None else list(value.shape), "module": value.module}
    optional |= {"available": "never" if value.available == INSIDE else value.available}
    optional |= {"passing": value.passing}
    return {"id": value.id, "bytes": int(value.nbytes), **_unless(optional, **_VALUE_DEFAULTS)}


def _op_to_data(op: Op, ids: list[str]) -> dict[str, Any]:
    optional = {
        "seconds": float(op.seconds),
        "scratch_bytes": int(op.scratch_bytes),
        "phase": op.phase,
        "once": "" if op.once is None else _name_of(op.once),
        "note": op.note,
        "kind": op.kind,
        "in_place": {ids[new]: ids[old] for new, old in op.in_place},
        "module": op.module,
        "source": op.source,
        "call": op.call,
        "rerun_seconds": None if op.rerun_seconds is None else float(op.rerun_seconds),
        "rerun_scratch_bytes": None if op.rerun_scratch_bytes is None else int(op.rerun_scratch_bytes),
    }
    return {
        "name": op.name,
        "reads": [ids[v] for v in op.reads],
        "writes": [ids[v] for v in op.writes],
        **_unless(optional, **_OP_DEFAULTS),
    }


def _name_of(once: Once) -> str:
    return once.name.lower().replace("_", "-")


def _unless(fields: dict[str, Any], **defaults: object) -> dict[str, Any]:
    """Select the fields that differ from their default."""
    return {name: value for name, value in fields.items() if value != defaults[name]}


def write_json(data: Mapping[str, Any], path: str | Path | None = None) -> str:
    """Write the data as JSON text, a line for each element.

    Each value, op and run has its own, so differences are readable. The text is also written to ``path`` if given.

    The same data gives the same text on every machine.

    Raises:
        InvalidProgram: a number that JSON cannot hold (infinite or not a number).
    """
    text = _object_text(data, "") + "\n"
    if path is not None:
        write_text(path, text)
    return text


def _object_text(data: Mapping[str, Any], indent: str) -> str:
    inner = indent + " "
    lines = [f"{inner}{json.dumps(name)}: {_field_text(name, item, inner)}" for name, item in data.items()]
    return "{\n" + ",\n".join(lines) + f"\n{indent}}}"


def _field_text(name: str, item: Any, indent: str) -> str:
    """Lay out one field: lists of lists or objects element by element.

    A nested file is an object of its own; the rest is compact.
    """
    if isinstance(item, dict):
        return _object_text(item, indent)
    if isinstance(item, list) and item and isinstance(item[0], (dict, list)):
        return "[\n" + ",\n".join(f"{indent} {_compact(name, element)}" for element in item) + f"\n{indent}]"
    return _compact(name, item)


def _compact(name: str, item: Any) -> str:
    try:
        return json.dumps(item, allow_nan=False)
    except ValueError as error:
        raise InvalidProgram(f"field {name!r}: JSON holds finite numbers only, got {item!r}") from error


# --- Reading ----------------------------------------------------------------------------------------------------------


def read_json(source: str | Path | Mapping[str, Any]) -> Mapping[str, Any]:
    """Read JSON data from text, from a file, or from parsed data.

    Text starts with ``{``; any other string is the name of a file.

    Raises:
        InvalidProgram: the text is not a JSON object.
        FileNotFoundError: the text does not start with ``{`` and no file has that name.
    """
    if isinstance(source, Mapping):
        return source
    if isinstance(source, str) and source.lstrip().startswith("{"):
        return _parse(source, "the text")
    what = f"file {str(source)!r}"
    try:
        text = Path(source).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise InvalidProgram(f"{what} is not text in UTF-8, so it is no JSON; name the file of a program") from None
    return _parse(text, what)


def _parse(text: str, what: str) -> Mapping[str, Any]:
    try:
        data = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise InvalidProgram(f"{what} is not valid JSON: {error}") from error
    if not isinstance(data, dict):
        raise InvalidProgram(f"{what} is not a JSON object; a program file starts with {{")
    return data


def repeated_from_data(data: Mapping[str, Any]) -> Repeated:
    """Make a folded program of JSON data.

    Raises:
        InvalidProgram: as ``program_from_data``, or nothing is folded there.
    """
    item, where = _get(data, "program", "repeats", dict), "repeats"
    stretches = [_stretch(item, name) for name in ("forward", "backward")]
    layout = Layout(_get(item, where, "count", int), *stretches)
    return Repeated(_written_program(data), layout, _get(item, where, "times", int))


def _stretch(item: Mapping[str, Any], name: str) -> tuple[int, int]:
    found = _get(item, "repeats", name, list)
    if len(found) != 2 or any(type(n) is not int or n < 0 for n in found):
        raise InvalidProgram(f"repeats: field {name!r} must be [first op, number of ops], got {found!r}")
    return found[0], found[1]


def program_from_data(data: Mapping[str, Any]) -> Program:
    """Make a program of JSON data; write out one that is folded.

    Raises:
        InvalidProgram: wrong format or version, a missing field, a wrong type, an unknown id, or whatever ``Program``
            itself refuses.
    """
    return unfold(repeated_from_data(data)) if "repeats" in data else _written_program(data)


def _written_program(data: Mapping[str, Any]) -> Program:
    version = _check_header(data, PROGRAM_FORMAT)
    values = tuple(_value_from_data(i, item) for i, item in enumerate(_get(data, "program", "values", list)))
    index = {value.id: v for v, value in enumerate(values)}
    ops = tuple(_op_from_data(i, item, index, version) for i, item in enumerate(_get(data, "program", "ops", list)))
    name = _get(data, "program", "name", str)
    return Program(
        name,
        values,
        ops,
        timing=_get(data, "program", "timing", str, "given"),
        measured_share=_number(data, "program", "measured_share", -1.0),
        recorded=_get(data, "program", "recorded", str, ""),
        link=_link(data["link"]) if "link" in data else None,
        **({"abilities": _abilities(data["abilities"])} if "abilities" in data else {}),
    )


def plan_from_data(data: Mapping[str, Any]) -> Plan:
    """Make a plan with its program of JSON data.

    Without ``frees`` every value is freed as early as the order allows.

    Its figures are taken as they are: ``verify(plan.program, plan)`` checks them.

    Raises:
        InvalidProgram: wrong format or version, a missing field, a wrong type, an unknown id or op.
    """
    _check_header(data, PLAN_FORMAT)
    program = program_from_data(_get(data, "plan", "program", dict))
    return Plan(
        program=program,
        schedule=_schedule_from_data(data, program),
        budget_bytes=_get(data, "plan", "budget_bytes", int),
        peak_bytes=_get(data, "plan", "peak_bytes", int),
        plain_peak_bytes=_get(data, "plan", "plain_peak_bytes", int),
        floor_bytes=_get(data, "plan", "floor_bytes", int),
        overhead=_number(data, "plan", "overhead"),
        lower_bound=_number(data, "plan", "lower_bound"),
        solver=_get(data, "plan", "solver", str),
        candidates=tuple(_candidate(i, item) for i, item in enumerate(_get(data, "plan", "candidates", list, ()))),
        floor_lower_bound_bytes=_get(data, "plan", "floor_lower_bound_bytes", int, 0),
        stopped=_get(data, "plan", "stopped", str, ""),
        plain_seconds=_number(data, "plan", "plain_seconds", 0.0),
    )


def _check_header(data: Mapping[str, Any], expected: str) -> int:
    """Read the version; refuse another format or an unknown version."""
    found = _get(data, "file", "format", str)
    if found != expected:
        hint = {
            PLAN_FORMAT: "; Plan.from_json and `autoremat explain` read plans",
            PROGRAM_FORMAT: "; Program.from_json and `autoremat solve` read programs",
        }
        raise InvalidProgram(f"file: field 'format' must be {expected!r}, got {found!r}{hint.get(found, '')}")
    version = _get(data, "file", "version", int)
    if version not in (1, VERSION):
        raise InvalidProgram(
            f"file: field 'version' is {version}, but this autoremat reads versions 1 and {VERSION} of {expected}; "
            "update autoremat, or write the file as one of them"
        )
    return version


def _abilities(item: Any) -> Abilities:
    if not isinstance(item, dict):
        raise InvalidProgram(f"program: field 'abilities' must be an object, got {item!r}")
    reruns, most_runs = _get(item, "abilities", "reruns", str, "anywhere"), item.get("most_runs")
    if reruns not in get_args(Reruns):
        raise InvalidProgram(f"abilities: field 'reruns' must be one of {', '.join(get_args(Reruns))}, got {reruns!r}")
    if most_runs is not None and (type(most_runs) is not int or most_runs < 1):
        raise InvalidProgram(f"abilities: field 'most_runs' must be a positive integer or null, got {most_runs!r}")
    return Abilities(reruns, most_runs, _get(item, "abilities", "ordered", bool, True))  # type: ignore[arg-type]


def _link(item: Any) -> Link:
    if not isinstance(item, dict):
        raise InvalidProgram(f"program: field 'link' must be an object, got {item!r}")
    return Link(
        _number(item, "link", "out_bytes_per_second"),
        _number(item, "link", "in_bytes_per_second"),
        _number(item, "link", "latency_seconds", 0.0),
        _get(item, "link", "takes_turns", bool, True),
        _get(item, "link", "tier_bytes", int, None),
        _get(item, "link", "name", str, ""),
    )


def _value_from_data(i: int, item: Any) -> Value:
    where = _where("value", i, item, "id")
    return Value(
        id=_get(item, where, "id", str),
        nbytes=_get(item, where, "bytes", int),
        fixed=_get(item, where, "fixed", bool, False),
        held=_op_index(item, where, "held", "end", END),
        label=_get(item, where, "label", str, ""),
        kind=_get(item, where, "kind", str, ""),
        dtype=_get(item, where, "dtype", str, ""),
        shape=_shape(item, where),
        module=_get(item, where, "module", str, ""),
        available=_op_index(item, where, "available", "never", INSIDE),
        passing=_get(item, where, "passing", bool, False),
    )


def _shape(item: Mapping[str, Any], where: str) -> tuple[int, ...] | None:
    sizes = _get(item, where, "shape", list, None)
    if sizes is None:
        return None
    if any(type(n) is not int or n < 0 for n in sizes):
        raise InvalidProgram(f"{where}: field 'shape' must be a list of sizes, got {sizes!r}")
    return tuple(sizes)


def _op_index(item: Mapping[str, Any], where: str, name: str, word: str, meaning: int) -> int | None:
    """Read the index of an op, or the one word allowed there.

    In memory that word is an index below 0.
    """
    found = item.get(name)
    if found is None:
        return None
    if found == word:
        return meaning
    if type(found) is not int or found < 0:
        raise InvalidProgram(f"{where}: field {name!r} must be the index of an op or {word!r}, got {found!r}")
    return found


def _op_from_data(i: int, item: Any, index: Mapping[str, int], version: int) -> Op:
    where = _where("op", i, item, "name")
    name = _get(item, where, "name", str)
    reason, kind = _as_in_version_1(item, where, name) if version == 1 else _once(item, where)
    return Op(
        name=name,
        reads=_ids(item, where, "reads", index),
        writes=_ids(item, where, "writes", index),
        seconds=_number(item, where, "seconds", 0.0),
        scratch_bytes=_get(item, where, "scratch_bytes", int, 0),
        phase=_get(item, where, "phase", str, "forward"),
        once=None if reason is None else reason.once,
        note="" if reason is None else reason.note,
        kind=kind,
        in_place=_in_place(item, where, index),
        module=_get(item, where, "module", str, ""),
        source=_get(item, where, "source", str, ""),
        call=_get(item, where, "call", int, -1),
        rerun_seconds=_number(item, where, "rerun_seconds") if "rerun_seconds" in item else None,
        rerun_scratch_bytes=_get(item, where, "rerun_scratch_bytes", int, None),
    )


def _ids(item: Mapping[str, Any], where: str, name: str, index: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(_lookup(where, name, v, index) for v in _get(item, where, name, list))


def _in_place(item: Mapping[str, Any], where: str, index: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    pairs = _get(item, where, "in_place", dict, {})
    return tuple(
        (_lookup(where, "in_place", new, index), _lookup(where, "in_place", old, index)) for new, old in pairs.items()
    )


def _once(item: Mapping[str, Any], where: str) -> tuple[Reason | None, Kind]:
    """Read why the op must not run again, and what it is.

    The reason is None where it may.
    """
    name, kind = _get(item, where, "once", str, ""), _get(item, where, "kind", str, "op")
    if kind not in get_args(Kind):
        raise InvalidProgram(f"{where}: field 'kind' must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    known = {_name_of(once): once for once in Once}
    if name and name not in known:
        raise InvalidProgram(
            f"{where}: field 'once' must be 'given', with the reason in 'note', or one of the reasons that autoremat "
            f"knows ({', '.join(known)}), got {name!r}"
        )
    return Reason(known[name], _get(item, where, "note", str, "")) if name else None, kind  # type: ignore[return-value]


def _as_in_version_1(item: Mapping[str, Any], where: str, name: str) -> tuple[Reason | None, Kind]:
    """Read the same from a file of version 1.

    There a sentence says why, and the name says what the op is.
    """
    text = _get(item, where, "repeatable", str, "yes")
    kind: Kind = "ask" if name == "unpack" else "step" if name == "optimizer step" else "op"
    if text == "yes":
        return None, kind
    if not text.startswith("no: ") or text == "no: ":
        raise InvalidProgram(f"{where}: field 'repeatable' must be 'yes' or 'no: <reason>', got {text!r}")
    text = text.removeprefix("no: ")
    return Reason(Once.BACKWARD) if text == "backward" else Reason.read(text), kind


def _schedule_from_data(data: Mapping[str, Any], program: Program) -> Schedule:
    order = _order(data, len(program.ops))
    index = {value.id: v for v, value in enumerate(program.values)}
    items = _get(data, "plan", "offloads", list, [])
    offloads = tuple(_offload(k, item, index, len(order)) for k, item in enumerate(items))
    if "frees" not in data:
        return replace(Schedule.from_order(program, order), offloads=offloads)
    frees = [_frees(p, item, index) for p, item in enumerate(_get(data, "plan", "frees", list))]
    try:
        return Schedule(order, tuple(frees), offloads)
    except InvalidSchedule as error:
        raise InvalidProgram(f"plan: field 'frees': {error}") from error


def _order(data: Mapping[str, Any], n_ops: int) -> tuple[int, ...]:
    order = _get(data, "plan", "order", list)
    for p, i in enumerate(order):
        if type(i) is not int or not 0 <= i < n_ops:
            raise InvalidProgram(f"plan: field 'order' must hold op indices below {n_ops}, got {i!r} for run {p}")
    return tuple(order)


def _frees(run: int, item: Any, index: Mapping[str, int]) -> tuple[int, ...]:
    """Read what leaves after one run, by id or by index."""
    where = f"plan, run {run}"
    if not isinstance(item, list):
        raise InvalidProgram(f"{where}: field 'frees' must be a list of values, got {item!r}")
    n = len(index)
    return tuple(v if type(v) is int and 0 <= v < n else _lookup(where, "frees", v, index) for v in item)


def _offload(k: int, item: Any, index: Mapping[str, int], n_runs: int) -> Offload:
    """Read a value's stay in the tier.

    It is the value, and the runs of its four events.
    """
    where = f"plan, offload {k}"
    if not isinstance(item, list) or len(item) != len(_OFFLOAD):
        raise InvalidProgram(f"{where}: must be [{', '.join(_OFFLOAD)}], got {item!r}")
    value, *runs = item
    for name, run in zip(_OFFLOAD[1:], runs, strict=True):
        if type(run) is not int or not 0 <= run < n_runs:
            raise InvalidProgram(f"{where}: {name!r} must be a run below {n_runs}, got {run!r}")
    return Offload(_lookup(where, "offloads", value, index), *runs)


def _candidate(i: int, item: Any) -> tuple[str, int, float]:
    where = f"plan, candidate {i}"
    if not isinstance(item, list) or len(item) != len(_CANDIDATE):
        raise InvalidProgram(f"{where}: must be [solver, peak_bytes, overhead], got {item!r}")
    named = dict(zip(_CANDIDATE, item, strict=True))
    return _get(named, where, "solver", str), _get(named, where, "peak_bytes", int), _number(named, where, "overhead")


# --- Fields -----------------------------------------------------------------------------------------------------------


def _where(what: str, i: int, item: Any, name: str) -> str:
    """Name an element in messages: its index and, if any, its name."""
    if not isinstance(item, dict):
        raise InvalidProgram(f"{what} {i} must be an object, got {item!r}")
    return f"{what} {i} ({item[name]})" if isinstance(item.get(name), str) else f"{what} {i}"


def _get(item: Mapping[str, Any], where: str, name: str, kind: type[_T], default: Any = _REQUIRED) -> _T:
    """Read a field of exactly that JSON type (``true`` is no integer)."""
    found = item.get(name, default)
    if found is _REQUIRED:
        raise InvalidProgram(f"{where}: field {name!r} is missing")
    if found is not default and type(found) is not kind:
        raise InvalidProgram(f"{where}: field {name!r} must be {_KINDS[kind]}, got {found!r}")
    if type(found) is int and abs(found) > _LARGEST:
        raise InvalidProgram(f"{where}: field {name!r} has {len(str(found))} digits; the largest integer is {_LARGEST}")
    return found  # type: ignore[no-any-return]  # its type has just been compared


def _number(item: Mapping[str, Any], where: str, name: str, default: Any = _REQUIRED) -> float:
    """Read a field as a finite float; JSON may write an integer."""
    found = item.get(name, default)
    if found is _REQUIRED:
        raise InvalidProgram(f"{where}: field {name!r} is missing")
    if type(found) not in (int, float) or not abs(found) <= sys.float_info.max:
        raise InvalidProgram(f"{where}: field {name!r} must be a finite number, got {found!r}")
    return float(found)


def _lookup(where: str, name: str, v: Any, index: Mapping[str, int]) -> int:
    if not isinstance(v, str) or v not in index:
        raise InvalidProgram(f"{where}: field {name!r} names value {v!r}, which is not among the values of the program")
    return index[v]
