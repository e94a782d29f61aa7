"""What the rules cannot find for themselves: odd configs, and architectures that are not built."""

from __future__ import annotations

from typing import Any

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_INDEXER = {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8,
            "indexer_budget": 4, "indexer_compress_ratio": 2}  # fmt: skip
_SWA = {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8,
        "swa_kv_lora_rank": 8, "swa_head_dim": 8, "swa_qk_nope_head_dim": 4, "swa_v_head_dim": 6,
        "qk_nope_head_dim": 4, "head_dim": 8}  # fmt: skip
_FORECAST = {"prediction_length": 6, "context_length": 12, "lags_sequence": [1, 2]}
_CODEC = {"num_filters": 4, "codebook_dim": 16, "vector_quantization_hidden_dimension": 16}
_LOOKAHEAD = {"sliding_window": 5, "default_num_lookahead_tokens": 1}
_SEGMENTER = {"prompt_encoder_config": {"image_embedding_size": 4},
              "vision_config": {"output_channels": 32, "num_pos_feats": 16},
              "mask_decoder_config": {"vit_dim": 32}}  # fmt: skip
_ROUTED = {"n_routed_experts": 4, "num_experts_per_tok": 2}

# Config values by architecture; a dict under a part's name goes to that part.
OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"],
                         "mamba_n_heads": 4, "mamba_d_head": 16},
    "recurrent_gemma": {"num_hidden_layers": 3, "attention_window_size": 5},
    "zamba": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
              "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"num_hidden_layers": 4, "attention_hidden_size": 64, "attention_head_dim": 16,
               "mamba_headdim": 16, "n_mamba_heads": 4, "num_query_groups": 4,
               "hybrid_layer_ids": [1, 3], "num_key_value_heads": 4,
               "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "dbrx": {"attn_config": {"rope_theta": 10000.0, "kv_n_heads": 2, "clip_qkv": 8.0},
             "ffn_config": {"moe_num_experts": 4, "moe_top_k": 2, "ffn_hidden_size": 48}},
    "dots1": {**_ROUTED, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v2": _ROUTED,
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE}},
    "cohere_compass": {"text_config": {"rope_parameters": {"full_attention": _ROPE}}},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_vl": {"text_config": {"layer_types": ["conv", "full_attention"]}},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "blt": {"encoder_hash_byte_group_vocab": 50, "num_hidden_layers": 2,
            "encoder_config": {"hidden_size_global": 32},
            "decoder_config": {"hidden_size_global": 32}},
    "xmod": {"default_language": "en_XX"},
    "esm": {"vocab_size": 96, "pad_token_id": 1, "mask_token_id": 3},
    "glm5_next_text": {"index_kpool": 2},
    "glm5_next": {"text_config": {"index_kpool": 2}},
    "qwen4_exp_text": _INDEXER,
    "qwen4_exp": {"text_config": _INDEXER},
    "mistral4": {"qk_nope_head_dim": 4, "head_dim": 8, "qk_head_dim": 8},
    "chameleon": {"vocabulary_map": {"<image>": 90, "IMGIMGA": 91}},
    "emu3": {"vocabulary_map": {"<image>": 90, "<|visual token 0|>": 91}},
    "blip-2": {"image_token_id": 90, "num_query_tokens": 4},
    "instructblip": {"image_token_id": 90, "num_query_tokens": 4},
    "instructblipvideo": {"video_token_id": 90, "num_query_tokens": 1},
    "kosmos-2": {"latent_query_num": 4},
    "ernie4_5_vl_moe": {"text_config": {"rope_parameters": {**_ROPE, "mrope_section": [1, 1, 2]}}},
    "diffusion_gemma": {"canvas_length": 12, "text_config": {
        "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}},
    "informer": _FORECAST,
    "time_series_transformer": _FORECAST,
    "decision_transformer": {"state_dim": 6, "act_dim": 3, "max_ep_len": 64},
    "dia": {"decoder_config": {"num_channels": 2}, "delay_pattern": [0, 1]},
    "kyutai_speech_to_text": {"num_codebooks": 2, "codec_config": _CODEC},
    "csm": {"codec_config": _CODEC},
    **dict.fromkeys(["mimi", "mimi_encoder", "mimi_decoder"], _CODEC),
    "bridgetower": {"hidden_size": 64, "text_config": {"hidden_size": 64},
                    "vision_config": {"hidden_size": 64}},
    "muse_glimmer_assistant": {"target_layer_ids": [0, 1], "block_size": 4},
    "muse_spark_audio": {"num_hidden_layers": 2, "hidden_sizes": [16, 32], "depths": [1, 1],
                         "patch_sizes": [4, 4]},
    "dots3_note_text": _SWA,
    "dots3_note": {"text_config": _SWA},
    "neomme": {"rope_parameters": {"full_attention": {**_ROPE, "partial_rotary_factor": 0.5},
                                   "sliding_attention": _ROPE}},
    "vivit": {"num_frames": 4},
    "vitpose_backbone": {"image_size": [32, 32], "patch_size": [8, 8]},
    "videomae": {"num_frames": 4},
    "timesformer": {"num_frames": 2},
    "patchtsmixer": {"self_attn": True},
    "yolos": {"image_size": [32, 32]},
    "canary": {"encoder_config": {"num_mel_bins": 80}},
    "moonshine_streaming": {"num_key_value_heads": 4},
    "nemotron_asr_streaming_encoder": _LOOKAHEAD,
    "nemotron_asr_streaming": {"encoder_config": _LOOKAHEAD},
    "nemotron3_5_asr": {"encoder_config": _LOOKAHEAD},
    "sam": _SEGMENTER,
    "sam_hq": _SEGMENTER,
    "sapiens2": {"num_key_value_heads_per_layer": [4, 2]},
    "step3p7": {"text_config": {"sliding_window": 5}},
    "sam3_lite_text_text_model": {"num_hidden_layers": 3},  # convolutions around
}  # fmt: skip

# Families whose activations grow without bound under the usual weights: smaller ones.
GAINS: dict[str, float] = {"mobilebert": 0.5}

# Models in which packed documents mix outside attention, as they do in eager, each with the reason.
MIXED_DOCUMENTS: dict[str, str] = {
    "mobilebert": "its embeddings join every token with its neighbours, of other documents too",
    **dict.fromkeys(
        ["sam3_lite_text", "sam3_lite_text_text_model"],
        "convolutions over the text join every token with its neighbours, of other documents too",
    ),
}

# Models that compute with their rows of padding. Eager attention averages all keys in a row that
# may see none, sdpa and `flash` give zeros there: compared with sdpa.
PADDING_IS_CONTENT: dict[str, str] = {
    "blt": "padding is bytes like any other in its patches: padded rows differ in eager too",
}

# Composite models that cannot be made or fed here, of which the part that reads text is compared:
# its architecture, or the name of its class where no auto class makes it alone.
TEXT_TOWERS: dict[str, str] = {
    "align": "AlignTextModel",
    "clap": "ClapTextModel",
    "fast_vlm": "qwen2",
    "florence2": "bart",
    "fun_asr_nano": "qwen3",
    "gemma3n": "gemma3n_text",
    "granite4_vision": "Granite4VisionTextModel",
    "molmo2": "molmo2_text",
    "muse_spark": "muse_spark_text",
    "nemotron_h_omni": "nemotron_h",
    "perception_lm": "llama",
    "pi0": "gemma",
    "sam3": "clip_text_model",
    "sam3_lite_text": "sam3_lite_text_text_model",
    "sam3_video": "clip_text_model",
    "vibevoice": "qwen2",
    "vibevoice_asr": "qwen2",
    "voxtral_realtime": "VoxtralRealtimeTextModel",
    "qwen2_5_omni": "qwen2_5_omni_thinker",
    "qwen3_omni_moe": "qwen3_omni_moe_thinker",
}

# Architectures of which no tiny model is made, each with the reason. One that fails to build and
# is not listed here fails the sweep.
_TIMM = "its image backbone needs timm, which is no dependency of ours; reads no text"
_DETECTOR = "a detector or segmenter over a pyramid of backbone sizes; reads no text"
_LARGE_IMAGES = "a segmenter whose sizes fit images of 1024 pixels only; reads no text"
_ANY_BACKBONE = "a head over an image backbone of any family; reads no text"
_OCR = "a convolutional recogniser of text lines that no small image passes; reads no text"
_DRAFTS = "every layer reads the keys of another model, and its own config refuses to make one so"
NOT_BUILT: dict[str, str] = {
    **dict.fromkeys(
        ["conditional_detr", "deformable_detr", "detr", "edgetam", "edgetam_vision_model",
         "gemma3n_vision", "pe_audio_video", "pe_audio_video_encoder", "pe_video",
         "pe_video_encoder", "timm_backbone", "timm_wrapper"], _TIMM),
    **dict.fromkeys(
        ["chmv2", "d_fine", "deimv2", "depth_anything", "depth_pro", "eomt", "eomt_dinov3",
         "lw_detr", "maskformer", "pp_doclayout_v2", "pp_doclayout_v3", "pp_doclayout_v4",
         "pp_ocrv5_mobile_det", "pp_ocrv5_server_det", "pp_ocrv6_medium_det", "pp_ocrv6_small_det",
         "prompt_depth_anything", "rf_detr", "tipsv2_dpt", "rt_detr", "rt_detr_v2"], _DETECTOR),
    **dict.fromkeys(
        ["sam2", "sam2_hiera_det_model", "sam2_video", "sam2_vision_model", "sam3_tracker",
         "sam3_tracker_video", "sam3_vision_model", "sam3_vit_model"], _LARGE_IMAGES),
    **dict.fromkeys(["upernet", "vitmatte", "vitpose"], _ANY_BACKBONE),
    **dict.fromkeys(
        ["pp_ocrv5_mobile_rec", "pp_ocrv5_server_rec", "pp_ocrv6_small_rec", "pp_ocrv6_tiny_rec"],
        _OCR),
    "vits": "durations drawn by random weights ask for hundreds of gigabytes",
    "edgetam_video": "reads a session of tracked video frames; no text",
    "efficientloftr": "matches the key points of image pairs; reads no text",
    "lightglue": "matches the key points of image pairs; reads no text",
    "glm_image_vqmodel": "an image codec that has no forward pass",
    "gemma4_assistant": _DRAFTS,
    "gemma4_unified_assistant": _DRAFTS,
    "voxtral_realtime_text": "no auto class makes it; it is compared as a part of voxtral_realtime",
    **dict.fromkeys(
        ["vibevoice_acoustic_tokenizer", "vibevoice_acoustic_tokenizer_decoder",
         "vibevoice_acoustic_tokenizer_encoder"], "a convolutional audio codec; reads no text"),
    "t5gemma2_encoder": "its class asks its own config for a dropout_rate that is not there",
    "xcodec": "an audio codec; reads no text",
    "xcodec2": "an audio codec over a large speech model; reads no text",
    "neucodec": "an audio codec over a large speech model; reads no text",
    "higgs_audio_v2_tokenizer": "an audio codec that needs torchaudio; reads no text",
}  # fmt: skip
