"""What lm-evaluation-harness makes of 200 questions and a small model: the oracle of `analyze --eval`.

    .venv/bin/pip install -r tests/reference/requirements-evaluation.txt
    .venv/bin/python tests/reference/make_evaluation.py [--check]

Writes tests/fixtures/evaluation: a gated model of bytes with random weights (config.json, model.safetensors), its
tokenizer for the harness is made here and not kept; questions.jsonl; and expected.json with the harness's accuracies,
their standard errors, and every log-likelihood, for no shots and for two, cloze and by letters, and where the
context does not fit.
"""
import argparse
import json
import pathlib
import random
import sys
import tempfile

import lm_eval
import torch
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gated_qwen3 import packed_model, qwen3_config
from make_fixtures import DEFAULTS, QWEN_SIZES

FIXTURE = pathlib.Path(__file__).parents[1] / "fixtures" / "evaluation"
QUESTIONS, CHOICES = 200, 4
LENGTH = 512  # positions of the model
WORDS = "the a red small old river stone house cat sings holds sees under behind near quiet Łódź naïve 日本 x+y 42".split()


def make_questions():
    draw = random.Random(1)
    sentence = lambda low, high: " ".join(draw.choice(WORDS) for _ in range(draw.randint(low, high)))
    for number in range(QUESTIONS):
        space = " " if number % 17 == 5 else ""  # at the end of a context: it belongs to the choice
        yield {
            "question": sentence(4, 14) + draw.choice([".", "?", ",", ":"]) + space,
            "choices": [sentence(1, 5) for _ in range(draw.randint(2, CHOICES))],
            "answer": 0,
        }


def with_answers(questions):
    draw = random.Random(2)
    for question in questions:
        yield question | {"answer": draw.randrange(len(question["choices"]))}


def make_model():
    """Weights large enough that the answers differ clearly."""
    case = DEFAULTS | QWEN_SIZES | dict(vocab_size=256, max_seq_len=LENGTH, n_layers=2, tied_embeddings=1)
    config = qwen3_config(
        case, use_qk_norm=True, qkv_bias=False, elementwise_attn_output_gate=True, headwise_attn_output_gate=False
    )
    model = packed_model(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.copy_(1 + 0.1 * noise if weight.dim() == 1 else noise * (0.5 if "embed" in name else 0.3))
    return config, model.eval()


def byte_tokenizer():
    """Token = byte: the harness then reads what a model of bytes reads."""
    shown = list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))
    letters = {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(sorted(set(range(256)) - set(shown)))}
    tokenizer = Tokenizer(models.BPE(vocab={letters[b]: b for b in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=letters[0], model_max_length=LENGTH)


def task(name, files, letters, shots):
    listed = "{{question}}{% for c in choices %}\n{{'ABCD'[loop.index0]}}. {{c}}{% endfor %}\nAnswer:"
    return dict(
        task=name, dataset_path="json", dataset_kwargs=dict(data_files=files),
        test_split="test", fewshot_split="shots", fewshot_config=dict(sampler="first_n"), num_fewshot=shots,
        output_type="multiple_choice", doc_to_text=listed if letters else "{{question}}", doc_to_target="answer",
        doc_to_choice="{{['A', 'B', 'C', 'D'][:choices|length]}}" if letters else "choices",
        metric_list=[dict(metric="acc"), dict(metric="acc_norm")],
    )


def harness(model, lines, letters, shots, length):
    """The first `shots` questions stand before the others, answered; what is longer than `length` loses its beginning."""
    name = f"questions_{'letters' if letters else 'cloze'}_{shots}"
    runner = HFLM(pretrained=model, tokenizer=byte_tokenizer(), device="cpu", batch_size=1, max_length=length)
    with tempfile.TemporaryDirectory() as directory:
        files = {}
        for split, part in (("shots", lines[:2]), ("test", lines[shots:])):
            files[split] = f"{directory}/{split}.jsonl"
            pathlib.Path(files[split]).write_text("".join(part))
        pathlib.Path(directory, "task.yaml").write_text(json.dumps(task(name, files, letters, shots)))  # JSON is YAML
        manager = TaskManager(include_path=directory, include_defaults=False)
        run = lm_eval.simple_evaluate(runner, tasks=[name], log_samples=True, task_manager=manager)
    result, samples = run["results"][name], sorted(run["samples"][name], key=lambda s: s["doc_id"])
    return {
        "form": "letters" if letters else "cloze", "shots": shots, "length": length, "questions": len(samples),
        "acc": result["acc,none"], "acc_norm": result["acc_norm,none"],
        "acc_stderr": result["acc_stderr,none"], "acc_norm_stderr": result["acc_norm_stderr,none"],
        "log_p": [[round(float(r[0][0]), 5) for r in s["resps"]] for s in samples],
    }


def make(directory):
    directory.mkdir(parents=True, exist_ok=True)
    questions = directory / "questions.jsonl"
    lines = [json.dumps(q, ensure_ascii=False) + "\n" for q in with_answers(make_questions())]
    questions.write_text("".join(lines))
    config, model = make_model()
    state = {k: v.contiguous().to(torch.bfloat16) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    save_file(state, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "config.json").write_text(json.dumps(config.to_diff_dict(), indent=1, sort_keys=True) + "\n")
    runs = [harness(model, lines, letters, shots, LENGTH) for letters in (False, True) for shots in (0, 2)]
    runs.append(harness(model, lines, False, 2, 100))
    versions = {"lm_eval": lm_eval.__version__, "torch": torch.__version__}
    (directory / "expected.json").write_text(json.dumps({"made with": versions, "runs": runs}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compares with what is stored")
    if not parser.parse_args().check:
        make(FIXTURE)
        return
    with tempfile.TemporaryDirectory() as directory:
        make(pathlib.Path(directory))
        for file in FIXTURE.iterdir():
            if file.read_bytes() != (pathlib.Path(directory) / file.name).read_bytes():
                sys.exit(f"{file.name} differs")


if __name__ == "__main__":
    main()
