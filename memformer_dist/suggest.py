"""Did you mean: the field that an unknown name was meant for, by its spelling or by what other trainers call it."""

import difflib
from collections.abc import Collection, Mapping

# What a field, a section or an option is called elsewhere: in nanoGPT, lingua, torchtitan, Megatron-LM, DeepSpeed,
# transformers, and in papers. Of several fields with one word, the first that the configuration has is suggested.
SYNONYMS = {
    "--run-dir": "output_dir out_dir save_dir dump_dir dump_folder run_dir logging_dir resume resume_from_checkpoint",
    "data.corpus": "corpus_dir dataset datasets dataset_name dataset_path dataset_dir data_path data_dir data_root"
    " data_prefix train_data train_data_path train_file train_files path root_dir",
    "data.lanes": "batch_size global_batch_size train_batch_size total_batch_size per_device_train_batch_size bsz bs"
    " num_lanes n_lanes",
    "data.segment_length": "seq_len seq_length sequence_length max_seq_len max_seq_length max_sequence_length block_size"
    " context_length context_len context_size max_length max_position_embeddings n_ctx ctx_len n_positions segment_size"
    " segment_len chunk_size chunk_length input_size tgt_len",
    "data.prefetch": "num_workers prefetch_factor prefetch_size dataloader_num_workers",
    "data.cache": "cache_dir cache_path cache_limit",
    "data.cache_gib": "cache_size cache_gb",
    "data.min_tokens": "min_length min_len min_doc_length",
    "data.shuffle_shards": "shuffle shuffle_buffer shuffle_buffer_size buffer_size",
    "data.seed": "data_seed shuffle_seed",
    "mrbp.window": "bptt bptt_len bptt_length bptt_depth bptt_window tbptt tbptt_steps truncation n_segments num_segments"
    " max_n_segments segments k2 horizon time_horizon unroll unroll_length",
    "mrbp.lanes_per_group": "micro_batch_size microbatch_size device_batch_size local_batch_size"
    " train_micro_batch_size_per_gpu gradient_accumulation_steps grad_accum grad_accum_steps grad_acc_steps accum_steps",
    "mrbp.replay": "memory_replay detach detach_memory stop_gradient",
    "mrbp.state_store": "offload cpu_offload offload_states",
    "mrbp.reduce": "no_sync",
    "model.cell": "model_type arch architecture architectures model_name flavor",
    "model.width": "d_model n_embd hidden_size hidden_dim hidden embed_dim embedding_dim embedding_size emb_dim model_dim"
    " dim",
    "model.heads": "n_head n_heads num_heads nhead num_attention_heads attention_heads",
    "model.feed_forward": "d_ff d_inner ffn_dim ff_dim ffn_size ffn_hidden_size intermediate_size mlp_dim inner_dim"
    " dim_feedforward feedforward",
    "model.slots": "mem_tokens mem_len mem_length mem_size n_mem num_mem_tokens num_memory_tokens memory_tokens"
    " memory_size memory_len memory_slots num_slots n_slots",
    "model.write_tokens": "mem_tokens n_mem num_mem_tokens num_memory_tokens memory_tokens num_write_tokens",
    "model.memory_width": "d_mem mem_dim memory_dim memory_size",
    "model.sensory_tokens": "num_sensory n_sensory sensory_size sensory_memory sensory_memory_size",
    "model.memory_length": "mem_len mem_length memory_len mem_size memory_size cache_len cache_length",
    "model.dropout": "dropout_rate dropout_prob dropout_p p_dropout embd_pdrop resid_pdrop attn_pdrop hidden_dropout"
    " hidden_dropout_prob attention_dropout",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth",
    "model.decoder_layers": "n_layer n_layers num_layers num_hidden_layers num_decoder_layers n_decoder_layers depth",
    "model.encoder_layers": "num_encoder_layers n_encoder_layers",
    "model.positions": "position_embedding position_embedding_type pos_emb rope rotary",
    "model.attention_bias": "bias use_bias add_bias_linear qkv_bias",
    "model.tie_embeddings": "tie_weights tie_word_embeddings tied_embeddings weight_tying",
    "model.init_std": "init_method_std initializer_range init_scale",
    "model.checkpoint_layers": "gradient_checkpointing activation_checkpointing use_checkpoint use_checkpointing"
    " checkpoint_activations recompute remat",
    "model.loss_chunk": "chunked_loss loss_chunk_size loss_chunks chunked_cross_entropy ce_chunk_size",
    "optimizer.learning_rate": "lr max_lr peak_lr base_lr",
    "optimizer.final_learning_rate_ratio": "min_lr min_lr_ratio min_lr_factor lr_min_ratio final_lr",
    "optimizer.warmup_tokens": "warmup warmup_steps warmup_iters warmup_ratio num_warmup_steps lr_warmup lr_warmup_iters"
    " lr_warmup_steps",
    "optimizer.betas": "beta beta1 beta2 adam_beta1 adam_beta2",
    "optimizer.epsilon": "eps adam_eps adam_epsilon",
    "optimizer.weight_decay": "wd decay l2",
    "optimizer.gradient_clipping": "max_norm max_grad_norm grad_clip grad_norm_clip clip_grad clip_grad_norm clip clipping"
    " gradient_clip_val",
    "optimizer": "lr_scheduler lr_scheduler_type lr_schedule scheduler optim adam adamw",
    "training.tokens": "steps max_steps num_steps train_steps total_steps training_steps iters max_iters train_iters"
    " num_iterations epochs max_epochs num_epochs num_train_epochs max_tokens total_tokens train_tokens num_tokens",
    "training.seed": "random_seed manual_seed",
    "training.precision": "dtype torch_dtype param_dtype model_dtype mixed_precision mixed_precision_param fp16 fp32 bf16"
    " bfloat16 float16 half amp autocast",
    "training.init_from": "init_checkpoint initial_load_path pretrained pretrained_model from_pretrained load load_from"
    " finetune_from model_name_or_path",
    "training.evaluate_every_tokens": "eval_every eval_interval eval_steps eval_freq evaluate_every evaluation_strategy"
    " eval_strategy val_interval val_every",
    "training.evaluate_segments": "eval_iters eval_batches eval_segments max_eval_steps max_eval_samples val_steps",
    "training.final_evaluate_segments": "test_iters test_batches test_segments max_test_steps",
    "training": "train trainer",
    "checkpoint.every_tokens": "save_every save_steps save_interval save_freq save_strategy checkpoint_every"
    " checkpoint_interval checkpoint_freq",
    "checkpoint.keep": "save_total_limit keep_last keep_latest_k keep_last_n max_checkpoints",
    "checkpoint": "checkpointing save",
    "monitor.log_every_steps": "log_every log_interval log_freq logging_steps print_freq",
    "monitor.device_peak_tflops": "peak_flops peak_tflops gpu_peak_flops",
    "monitor": "logging log logger metrics tensorboard wandb report_to",
    "deepspeed.zero_optimization": "zero zero_stage stage fsdp sharding_strategy",
}


def nearest(name: str, section: str, known: Mapping[str, Collection[str]]) -> str:
    """Return how a sentence about an unknown name ends: ", did you mean window?" or ", expected one of window, ...".

    Args:
        name: the unknown key of `section`, or an unknown section where that is "".
        known: the fields of every section, by its name.
    """
    if meant := elsewhere(name, section, known) or _alike(name, section, known):
        return f", did you mean {meant}?"
    return f", expected one of {', '.join(known[section] if section else known)}"


def elsewhere(name: str, section: str, known: Mapping[str, Collection[str]]) -> str | None:
    """Return what other trainers call `name`, or the field of that very name in another section; in full, or None.

    Of several, one in `section` comes first.
    """
    plain = name.lower().replace("-", "_")
    meant = [field for field, words in SYNONYMS.items() if plain in words.split() and _exists(field, known)]
    meant += [f"{other}.{plain}" for other, fields in known.items() if plain in fields]
    return min(meant, key=lambda field: not field.startswith(f"{section}."), default=None)


def _alike(name: str, section: str, known: Mapping[str, Collection[str]]) -> str | None:
    """Return what is spelled like `name`: in its section, else, more alike, in another."""
    if close := difflib.get_close_matches(name, list(known[section] if section else known), n=1):
        return close[0]
    places = {field: other for other, fields in reversed(list(known.items())) for field in fields}
    close = difflib.get_close_matches(name, list(places), n=1, cutoff=0.8)
    return f"{places[close[0]]}.{close[0]}" if close else None


def _exists(place: str, known: Mapping[str, Collection[str]]) -> bool:
    """Whether the configuration at hand has this section or field; options of programs always exist."""
    section, _, field = place.partition(".")
    return place.startswith("--") or (section in known and (not field or field in known[section]))
