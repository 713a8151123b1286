"""Ordinary English sentences of several lengths, and the inputs that tasks make of them.

Precisions are compared on them (`precision.py`). They are not those of any data set.
"""

from __future__ import annotations

from collections.abc import Mapping

from serving_kit.model import Input

TEXTS = (
    "The train was late again.",
    "She bought fresh bread at the market.",
    "I would not buy this phone a second time.",
    "The museum in Vienna opens at nine.",
    "Rain is expected in the north by Friday.",
    "He forgot his keys on the kitchen table.",
    "What a wonderful evening that was!",
    "The bank raised its rates twice this year.",
    "Our neighbours grow tomatoes and beans behind the house.",
    "The film starts slowly, but the last half hour is worth the wait.",
    "Maria works as a nurse in a small hospital near Lisbon.",
    "Please send the signed form back before the end of the month.",
    "The battery lasts two days, which is more than I had hoped for.",
    "Scientists found traces of water in the rocks below the crater.",
    "The waiter was friendly, yet the soup arrived cold and without a spoon.",
    "After the match, the fans walked quietly through the streets of Leeds.",
    "The company from Osaka will build its second factory in Mexico next spring.",
    "Nothing in this book is new, and most of it was said better before.",
    "My grandfather repaired clocks, radios and, when he had to, the roof of the church.",
    "The committee agreed on a budget after a debate that had lasted most of the night.",
    "If the pump makes a loud noise, turn it off and wait for ten minutes before you try again.",
    "The hotel was clean and quiet, the staff helped us with everything, and we will be back next summer.",
    "Anna Berg left the ministry in June to teach history at a school in the mountains of Norway.",
    "The new bridge across the river is open to cyclists, but cars will have to wait until the autumn.",
    "Although the road was closed because of the snow, the doctor reached the village before it was dark.",
    "The second season loses the humour of the first, and even good actors cannot rescue a plot that goes "
    "nowhere.",
    "Prices for coffee rose for the fourth month in a row, as heavy rain in Brazil delayed the harvest and "
    "emptied the stores.",
    "When the orchestra had played the last note, it was silent for a moment, and then the whole hall stood "
    "up and cheered.",
    "The update fixed the problem with the camera, but since then the phone takes almost a minute to start "
    "and gets rather warm in my pocket.",
    "Three students of the university in Nairobi have built a cheap sensor that tells farmers by message "
    "when their fields need water, and which of them need it first.",
    "The old harbour, where ships from Portugal once unloaded spices and cloth, is now a quarter of small "
    "theatres, bookshops and cafes that stay open until long after midnight.",
    "We ordered the table in March, were told twice that it would come within a week, and when it was "
    "finally delivered in May one of its legs was broken and no one at the shop answered the phone.",
)
_LABELS = ["travel", "business", "science"]

# So that an answer holds the score of every label and token. No label is "-".
_PARAMETERS: Mapping[str, Mapping[str, object]] = {
    "text-classification": {"top_k": None},
    "token-classification": {"ignore_labels": ["-"]},
    "zero-shot-classification": {"candidate_labels": _LABELS},
}


def example_inputs(task: str, mask: str) -> list[Input]:
    """One input of a task for each text.

    Args:
        task: Its name in `tasks.TASKS`.
        mask: The mask token: for fill-mask it takes the place of the word in the middle.
    """
    parameters = _PARAMETERS.get(task, {})
    return [Input(_masked(text, mask) if task == "fill-mask" else text, parameters) for text in TEXTS]


def _masked(text: str, mask: str) -> str:
    words = text.split()
    words[len(words) // 2] = mask
    return " ".join(words)
