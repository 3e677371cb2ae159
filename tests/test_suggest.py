"""A word that is none of ours, and the field that it was meant for."""

import json

import pytest

from memformer_dist.config import RunConfig, cell_configs, known_fields
from memformer_dist.errors import UserError
from memformer_dist.suggest import SYNONYMS
from tests.helpers.fields import problems, put

MEANT = {
    "data.lanes": ["batch_size", "per_device_train_batch_size", "global_batch_size"],
    "data.segment_length": ["seq_len", "block_size", "context_length", "max_seq_length", "n_ctx"],
    "data.corpus": ["dataset", "path", "data_path"],
    "mrbp.lanes_per_group": ["micro_batch_size", "gradient_accumulation_steps"],
    "mrbp.window": ["bptt", "n_segments"],
    "model.width": ["d_model", "n_embd", "hidden_size", "dim"],
    "model.heads": ["n_heads", "num_heads", "n_head", "num_attention_heads"],
    "model.feed_forward": ["d_ff", "ffn_dim", "intermediate_size"],
    "model.slots": ["mem_tokens", "mem_len", "n_mem", "num_mem_tokens"],
    "model.decoder_layers": ["n_layers", "n_layer", "num_hidden_layers"],
    "optimizer.learning_rate": ["lr", "max_lr"],
    "optimizer.warmup_tokens": ["warmup_steps", "warmup_iters", "warmup"],
    "optimizer.gradient_clipping": ["max_norm", "grad_clip", "max_grad_norm", "clip_grad"],
    "optimizer.betas": ["beta1", "beta2", "adam_beta1"],
    "optimizer.epsilon": ["eps", "adam_epsilon"],
    "training.tokens": ["max_steps", "steps", "epochs", "num_train_epochs", "max_iters"],
    "training.precision": ["dtype", "bf16", "fp16", "mixed_precision"],
    "training.evaluate_every_tokens": ["eval_every", "eval_steps", "eval_interval"],
    "checkpoint.every_tokens": ["save_every", "save_steps"],
    "--run-dir": ["output_dir", "out_dir"],
}


@pytest.mark.parametrize("field, word", [(field, word) for field, words in MEANT.items() for word in words])
def test_a_word_of_other_trainers_is_understood_wherever_it_stands(config, tmp_path, field, word):
    (tmp_path / "run.json").write_text(json.dumps(config))
    for section in ("model", "data", "mrbp", "optimizer", "training", "checkpoint", "monitor"):
        wrong = config | {section: config[section] | {word: 1}}
        assert problems(wrong) == [f"{section}.{word}: unknown key, did you mean {field}?"]
    assert problems(config | {word: 1}) == [f"{word}: unknown section, did you mean {field}?"]
    with pytest.raises(UserError) as caught:
        RunConfig.load(tmp_path / "run.json", [f"{word}=1"])
    assert str(caught.value).endswith(f"  --set {word}=1: expected section.field=value, did you mean {field}?")


@pytest.mark.parametrize(
    "name, meant",
    [
        ("training.window", "mrbp.window"),
        ("model.lanes", "data.lanes"),
        ("data.Lanes", "data.lanes"),
        ("training.num-train-epochs", "training.tokens"),
        ("model.learning-rate", "optimizer.learning_rate"),
        ("training.wieght_decay", "optimizer.weight_decay"),
        ("optimizer.gradient_accumulation_steps", "mrbp.lanes_per_group"),
        ("deepspeed.lr", "optimizer.learning_rate"),
        ("deepspeed.stage", "deepspeed.zero_optimization"),
        ("model.every_tokens", "checkpoint.every_tokens"),
    ],
)
def test_a_field_in_the_wrong_section(config, name, meant):
    put(config, name, 1)
    assert problems(config) == [f"{name}: unknown key, did you mean {meant}?"]


@pytest.mark.parametrize("name, meant", [("lr_scheduler", "optimizer"), ("wandb", "monitor"), ("seed", "data.seed")])
def test_a_section_that_is_not_there(config, name, meant):
    assert problems(config | {name: {}}) == [f"{name}: unknown section, did you mean {meant}?"]


@pytest.mark.parametrize(
    "override, meant",
    [("lanes=4", "data.lanes"), ("lanes", "data.lanes"), ("window=4", "mrbp.window"), ("seed=1", "data.seed")],
)
def test_set_without_a_section(config, tmp_path, override, meant):
    (tmp_path / "run.json").write_text(json.dumps(config))
    with pytest.raises(UserError) as caught:
        RunConfig.load(tmp_path / "run.json", [override])
    assert str(caught.value).endswith(f"  --set {override}: expected section.field=value, did you mean {meant}?")


def test_synonyms_are_of_fields_that_exist_and_are_no_fields_themselves():
    """A renamed field must be renamed in the table too, or its words would be lost silently."""
    cells = [known_fields({"cell": cell}) for cell in cell_configs()]
    for field, words in SYNONYMS.items():
        section, _, name = field.partition(".")
        assert field == "--run-dir" or any(section in known and (not name or name in known[section]) for known in cells)
        own = (
            {other for known in cells for other in (known[section] if name else known)}
            if section in cells[0]
            else set()
        )
        assert not own & set(words.split()), field
        assert len(set(words.split())) == len(words.split()), field
    elsewhere = [word for field, words in SYNONYMS.items() if not field.startswith("model.") for word in words.split()]
    assert len(set(elsewhere)) == len(elsewhere), "one word for two fields"
