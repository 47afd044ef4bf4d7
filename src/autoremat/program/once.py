"""``Once``: why an op runs only once, as sentences for people."""

from __future__ import annotations

from enum import Enum
from typing import Final, NamedTuple

_PLACE: Final = "{}"


class Once(Enum):
    """Says why an op must not run again.

    Where the sentence has ``{}``, a note says what stands there.

    Example:
        >>> Once.OVERWRITES.sentence("running_mean")
        'overwrites running_mean'
    """

    GIVEN = "{}"
    """Whoever made the program says so, in words of their own."""
    BACKWARD = "it belongs to the backward"
    KEPT = "kept on request"
    COMMUNICATES = "communicates with other processes"
    FOREIGN = "custom operator, not known to be free of side effects"
    OWN_STATE = "keeps state of its own for dropout"
    CHANGES_STORAGE = "changes the storage of a tensor"
    EFFECT = "has an effect outside its outputs"
    OTHER_BITS = "gives other last bits from run to run"
    STATISTICS = "updates running statistics"
    STATISTICS_NOT_BUFFERS = "updates running statistics that are not buffers"
    MADE_IS_CHANGED = "what it makes is changed by something that torch does not see"
    READ_IS_CHANGED = "what it reads is changed by something that torch does not see"
    OPAQUE = "uses a tensor whose storage cannot be seen (sparse, quantized, nested or a subclass)"
    OVERWRITES = "overwrites {}"
    OVERWRITES_OUTSIDE = "overwrites what the step did not make"
    UNINITIALISED = "returns uninitialised memory"
    READS_TAKEN_OVER = "reads {}, which is overwritten in place"
    READS_OVERWRITTEN = "reads {}, which every step overwrites"
    READS_CHANGING = "reads what the step overwrites, or what something else than torch may change"
    NOT_THERE = "reads what is not there any more, or makes nothing that can be told apart"
    FREED = "needs parameters that fully_shard has freed by then"
    DIFFERS = "gives something else when it runs again"
    UNRECORDED = "cannot be recorded ({})"
    UNKNOWN = "what it does is not known: it cannot be made on fake tensors"
    OVERRIDDEN = "goes through a __torch_function__ that is not torch's"
    DUAL = "computed in forward mode, with tangents"
    CALLBACK = "calls a function of the user's"
    DISTRIBUTED = "runs on distributed tensors"
    PASS = "a pass of its own"
    INNER_PASS = "computed by a backward pass in the forward"

    def sentence(self, note: str = "") -> str:
        """Fill the note into the sentence where there is a place."""
        return self.value.replace(_PLACE, note)


class Reason(NamedTuple):
    """Why one op runs only once."""

    once: Once
    note: str = ""

    def __str__(self) -> str:
        """Return the sentence."""
        return self.once.sentence(self.note)

    @classmethod
    def read(cls, sentence: str) -> Reason:
        """Find the reason that has this sentence.

        Where none has, the reason is in the writer's own words.

        Example:
            >>> Reason.read("overwrites level"), Reason.read("it rains").once.name
            (Reason(once=<Once.OVERWRITES: 'overwrites {}'>, note='level'), 'GIVEN')
        """
        if known := {once.value: once for once in Once if _PLACE not in once.value}.get(sentence):
            return cls(known)
        for once in (once for once in Once if _PLACE in once.value and once is not Once.GIVEN):
            before, _, after = once.value.partition(_PLACE)
            is_like = sentence.startswith(before) and sentence.endswith(after)
            if is_like and len(sentence) > len(before) + len(after):
                return cls(once, sentence[len(before) : len(sentence) - len(after)])
        return cls(Once.GIVEN, sentence)
