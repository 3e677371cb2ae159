"""Did you mean: the field that a name nobody knows was meant for, by its spelling or by what other trainers call it."""

import difflib
from collections.abc import Collection, Mapping

# What a field is called elsewhere: in nanoGPT, torchtitan, lingua, Megatron-LM, DeepSpeed, transformers, and in papers.
SYNONYMS = {
    "data.corpus": "dataset dataset_name dataset_path data_path data_dir train_data",
    "data.lanes": "batch_size global_batch_size train_batch_size per_device_train_batch_size num_lanes",
    "data.segment_length": "seq_len seq_length sequence_length max_seq_len max_seq_length block_size context_length"
    " context_len max_length n_ctx ctx_len segment_size chunk_size",
    "data.prefetch": "num_workers prefetch_factor dataloader_num_workers",
    "data.cache": "cache_dir",
    "mrbp.window": "bptt bptt_depth n_segments num_segments max_n_segments k2 tbptt horizon unroll time_horizon",
    "mrbp.lanes_per_group": "micro_batch_size microbatch_size device_batch_size train_micro_batch_size_per_gpu"
    " gradient_accumulation_steps grad_accum grad_acc_steps",
    "mrbp.reduce": "no_sync",
    "model.cell": "model_type architecture arch model_name",
    "model.width": "d_model n_embd hidden_size hidden_dim embed_dim embedding_size dim model_dim",
    "model.heads": "n_head n_heads num_heads num_attention_heads nhead attention_heads",
    "model.feed_forward": "d_ff ffn_dim ff_dim intermediate_size ffn_hidden_size mlp_dim dim_feedforward d_inner",
    "model.slots": "mem_tokens mem_len n_mem num_mem_tokens num_memory_tokens memory_size memory_slots num_slots n_slots"
    " memory_tokens mem_size",
    "model.dropout": "dropout_rate p_dropout resid_pdrop attn_pdrop hidden_dropout attention_dropout",
    "model.decoder_layers": "n_layer n_layers num_layers num_hidden_layers num_decoder_layers",
    "model.encoder_layers": "num_encoder_layers",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers",
    "model.tie_embeddings": "tie_weights tie_word_embeddings weight_tying tied_embeddings",
    "model.init_std": "initializer_range init_scale",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.final_learning_rate_ratio": "min_lr min_lr_ratio lr_min_ratio final_lr",
    "optimizer.warmup_tokens": "warmup warmup_steps warmup_iters num_warmup_steps warmup_ratio lr_warmup_iters",
    "optimizer.gradient_clipping": "max_norm grad_clip clip_grad max_grad_norm clip gradient_clip_val clip_grad_norm",
    "optimizer.betas": "beta beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.epsilon": "eps adam_epsilon adam_eps",
    "optimizer.weight_decay": "wd decay l2",
    "training.tokens": "steps max_steps train_steps num_steps max_iters train_iters total_tokens max_tokens epochs num_epochs"
    " num_train_epochs",
    "training.seed": "random_seed",
    "training.precision": "dtype mixed_precision bf16 fp16 amp torch_dtype param_dtype",
    "training.init_from": "init_checkpoint pretrained load_from resume_from finetune_from model_name_or_path",
    "training.evaluate_every_tokens": "eval_every eval_interval eval_steps val_interval evaluate_every eval_freq",
    "training.evaluate_segments": "eval_iters eval_batches max_eval_steps eval_segments",
    "checkpoint.every_tokens": "save_every save_steps save_interval checkpoint_interval checkpoint_every save_freq",
    "checkpoint.keep": "save_total_limit keep_last keep_latest_k max_checkpoints",
    "monitor.log_every_steps": "log_every log_interval logging_steps log_freq print_freq",
    "deepspeed.zero_optimization.stage": "zero_stage zero stage",
}


def nearest(name: str, section: str, known: Mapping[str, Collection[str]]) -> str:
    """How a message about an unknown name ends: ", did you mean window?" or ", expected one of window, ...".

    Args:
        name: the unknown key of `section`, or with section "" an unknown section.
        known: the fields of every section, by its name.
    """
    fields = known[section] if section else known
    close = difflib.get_close_matches(name, list(fields), n=1)
    meant = close[0] if close else elsewhere(name, section, known)
    return f", did you mean {meant}?" if meant else f", expected one of {', '.join(fields)}"


def elsewhere(name: str, section: str, known: Mapping[str, Collection[str]]) -> str | None:
    """The whole name of a field that other trainers call `name`, or that lies in another section."""
    plain = name.lower().replace("-", "_")
    meant = [field for field, words in SYNONYMS.items() if plain in words.split() and _exists(field, known)]
    meant += [f"{other}.{plain}" for other, fields in known.items() if plain in fields]
    return next((field for field in meant if field.startswith(f"{section}.")), meant[0] if meant else None)


def _exists(field: str, known: Mapping[str, Collection[str]]) -> bool:
    section, _, rest = field.partition(".")
    return section in known and rest.partition(".")[0] in known[section]
