"""What a request must look like before anyone works on it: the same rule on device and node.

Without numpy, so that the client SDK refuses bad input before it sends anything.
"""

from __future__ import annotations

from collections.abc import Sequence

from segue_contract.errors import BadSampling, EmptyPrompt, InvalidArgument, PromptTooLong
from segue_contract.ids import check_id
from segue_contract.limits import (
    MAX_NEW_TOKENS,
    MAX_PROMPT_BYTES,
    MAX_STOP_CHARS,
    MAX_STOP_STRINGS,
    MAX_TAILS,
    MAX_TEMPERATURE,
    MAX_TOP_K,
)
from segue_contract.plan import Shape
from segue_contract.sync.ops import Sampling

_MAX_SEED = 2**64 - 1


def check_text(value: str, what: str) -> bytes:
    """The UTF-8 bytes of `value`.

    Raises:
        InvalidArgument: it is no text, or holds half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise InvalidArgument(
            f"The {what} is {type(value).__name__}, not text.", hint="Decode it as UTF-8 first."
        )
    try:
        return value.encode()
    except UnicodeEncodeError as error:
        raise InvalidArgument(
            f"The {what} is not valid UTF-8 (character {error.start} is half of a surrogate pair).",
            hint="Read the text as UTF-8, or replace what cannot be decoded.",
        ) from error


def check_prompt(prompt: str) -> str:
    """Return `prompt` if a turn may be run with it.

    Raises:
        EmptyPrompt, PromptTooLong, InvalidArgument.
    """
    size = len(check_text(prompt, "prompt"))
    if not prompt.strip():
        raise EmptyPrompt("The prompt is empty.", hint="Say something.")
    if size > MAX_PROMPT_BYTES:
        raise PromptTooLong(
            f"The prompt has {size} bytes; {MAX_PROMPT_BYTES} are allowed.",
            hint="Send a shorter prompt.",
        )
    return prompt


def check_sampling_values(sampling: Sampling, max_tokens: int) -> None:
    """Raises BadSampling where a value is outside its range or NaN."""
    if not _is_int(max_tokens) or not 0 < max_tokens <= MAX_NEW_TOKENS:
        raise BadSampling(
            f"max_tokens is {max_tokens!r}.", hint=f"Use a whole number from 1 to {MAX_NEW_TOKENS}."
        )
    _check_number("temperature", sampling.temperature, 0.0, MAX_TEMPERATURE)
    _check_number("top_p", sampling.top_p, 0.0, 1.0, low_open=True)
    _check_number("min_p", sampling.min_p, 0.0, 1.0)
    if not _is_int(sampling.top_k) or not 0 <= sampling.top_k <= MAX_TOP_K:
        raise BadSampling(
            f"top_k is {sampling.top_k!r}.", hint=f"Use 0 (all) or a number up to {MAX_TOP_K}."
        )
    if not _is_int(sampling.seed) or not 0 <= sampling.seed <= _MAX_SEED:
        raise BadSampling(
            f"seed is {sampling.seed!r}.", hint="Use a whole number from 0 to 2**64 - 1."
        )


def check_stop(stop: Sequence[str]) -> tuple[str, ...]:
    """Return the stop strings if they may be used.

    Raises:
        InvalidArgument: too many, one is empty or too long, or no text.
    """
    if isinstance(stop, str):
        raise InvalidArgument("stop is one text.", hint='Give a list: stop=["..."].')
    if len(stop) > MAX_STOP_STRINGS:
        raise InvalidArgument(
            f"{len(stop)} stop strings were given; {MAX_STOP_STRINGS} are allowed.",
            hint="Use fewer stop strings.",
        )
    for text in stop:
        check_text(text, "stop string")
        if not 0 < len(text) <= MAX_STOP_CHARS:
            raise InvalidArgument(
                f"A stop string has {len(text)} characters.",
                hint=f"Use 1 to {MAX_STOP_CHARS} characters.",
            )
    return tuple(stop)


def check_plan(plan: str) -> str:
    """Return the name of a forced plan shape, or "" (the planner decides; "auto" means so too).

    Raises:
        InvalidArgument: no such shape.
    """
    if plan in ("", "auto"):
        return ""
    if plan not in frozenset(Shape):
        names = ", ".join(shape.value for shape in Shape)
        raise InvalidArgument(f"There is no plan {plan!r}.", hint=f"Use auto, {names}.")
    return plan


def check_run(prompt: str, max_tokens: int, sampling: Sampling, stop: Sequence[str]) -> None:
    """Everything that can be said of a turn without its model.

    Raises:
        EmptyPrompt, PromptTooLong, BadSampling, InvalidArgument.
    """
    check_prompt(prompt)
    check_sampling_values(sampling, max_tokens)
    check_stop(stop)


def check_tails(device: str, sessions: Sequence[str]) -> None:
    """Of a `Tails` request. Raises InvalidArgument where there are more than are answered at once,
    or the device's name cannot be one."""
    if len(sessions) > MAX_TAILS:
        raise InvalidArgument(
            f"{len(sessions)} sessions were named; {MAX_TAILS} are answered at once.",
            hint="Ask for them in several calls.",
        )
    check_id(device, "device")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_number(
    name: str, value: float, low: float, high: float, *, low_open: bool = False
) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    # NaN fails every comparison, so the range is asked for in the positive
    if is_number and (low < value if low_open else low <= value) and value <= high:
        return
    opening = "above" if low_open else "from"
    raise BadSampling(f"{name} is {value!r}.", hint=f"Use a number {opening} {low:g} to {high:g}.")
