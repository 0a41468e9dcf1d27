"""From what is asked to what is said: looks, walks, asks for what is missing, walks again."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

from ..config import Config
from ..status import Status
from .facts import Ask
from .fate import Cause, Outcome
from .judgement import judge
from .question import Asked, inquire
from .sentences import sentence
from .snapshot import Snapshot
from .steps import Step, steps
from .traverse import Hooks
from .walk import walk

#: How many questions the walk may have. It has some twenty.
MOST_QUESTIONS = 200


@dataclass(frozen=True)
class Explanation:
    """What there is to say: the way in steps, and the answer in one sentence, of which ``mend`` is a part.

    Texts are not safe to print: rules, comments and names of others are in them.
    """

    outcome: Outcome
    cause: Cause
    sentence: str
    mend: str
    steps: tuple[Step, ...]

    def to_json(self) -> str:
        """Return it as one JSON object; keys, outcomes and causes are API."""
        return json.dumps(asdict(self), indent=2)


async def explain(asked: Asked, current: Status | None, config: Config) -> Explanation:
    """Return what becomes of the packet that is asked about. ``current`` is what is published, None if not known.

    Raises ``QuestionError``.
    """
    async with Snapshot(config.containerd.address) as snapshot:
        facts = await snapshot.facts(asked, current, config)
        hooks = Hooks(facts.rules)
        for _ in range(MOST_QUESTIONS):
            try:
                inquiry = inquire(asked, facts)
                judgement = judge(inquiry, facts, walk(inquiry, facts, hooks))
                said, mend = sentence(inquiry, facts, judgement)
                way = tuple(steps(inquiry, facts, judgement.fate))
                return Explanation(judgement.outcome, judgement.cause, said, mend, way)
            except Ask as ask:
                answers = {**facts.answers, ask.question: await snapshot.answer(ask.question)}
                facts = replace(facts, answers=answers)
    raise AssertionError("the walk asks and asks")  # pragma: no cover - each question is asked once
