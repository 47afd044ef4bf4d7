"""The zoo: architectures as their libraries ship them, small and randomly initialised.

Every model is a line of data: how to make it, what goes in, how the loss comes out, and which switch of the library's
own checkpoints it. Libraries are imported only when a model is made.

Run: ``python benchmarks/zoo_models.py`` lists them.
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Specimen:
    """A model of the zoo.

    Attributes:
        name: the architecture.
        library: the package it comes from.
        kind: what it is for.
        model: makes it; random numbers are seeded before.
        inputs: makes the keyword arguments of its forward.
        loss: a scalar from what the forward returns.
        switch: turns on the library's own checkpointing; None where it has none.
    """

    name: str
    library: str
    kind: str
    model: Callable[[], nn.Module]
    inputs: Callable[[], Inputs]
    loss: Callable[[Any], Tensor]
    switch: Callable[[nn.Module], Any] | None = None


# ---- losses ----------------------------------------------------------------------------------------------------------


def own_loss(output: Any) -> Tensor:
    """The loss that the model has computed itself."""
    return output.loss


def mean_square(output: Any) -> Tensor:
    """Mean square of the first tensor that was returned."""
    while not isinstance(output, Tensor):
        output = output[0]
    return output.float().square().mean()


def first_class(output: Any) -> Tensor:
    """Cross-entropy, as if every example were of the first class."""
    logits = output[0] if isinstance(output, (tuple, list)) else output
    return F.cross_entropy(logits, torch.zeros_like(logits[:, 0], dtype=torch.long))


# ---- inputs ----------------------------------------------------------------------------------------------------------

VOCABULARY = 512


def tokens(batch: int = 8, length: int = 128, **more: Callable[[], Tensor]) -> Callable[[], Inputs]:
    """Random tokens that are their own labels."""

    def make() -> Inputs:
        ids = torch.randint(4, VOCABULARY, (batch, length))
        return {"input_ids": ids, "labels": ids.clone(), **{name: value() for name, value in more.items()}}

    return make


def padded(batch: int = 8, length: int = 128) -> Tensor:
    """An attention mask: the last quarter of half of the examples is padding."""
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[: batch // 2, -(length // 4) :] = 0
    return mask


def images(batch: int = 8, size: int = 64, name: str = "pixel_values", **more: Callable[[], Tensor]) -> Any:
    """Random images."""
    return lambda: {name: torch.randn(batch, 3, size, size), **{k: value() for k, value in more.items()}}


def noise(*shape: int) -> Callable[[], Tensor]:
    """Normally distributed numbers."""
    return lambda: torch.randn(shape)


def whole(high: int, *shape: int) -> Callable[[], Tensor]:
    """Random whole numbers below ``high``."""
    return lambda: torch.randint(0, high, shape)


def given(**values: Callable[[], Tensor]) -> Callable[[], Inputs]:
    """Keyword arguments one by one."""
    return lambda: {name: value() for name, value in values.items()}


# ---- transformers ----------------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "max_position_embeddings": 256, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GROUPED = TEXT | {"num_key_value_heads": 2}
EXPERTS = GROUPED | {"intermediate_size": 384, "moe_intermediate_size": 192, "num_experts_per_tok": 2}
SEQ2SEQ: dict[str, Any] = {
    "vocab_size": VOCABULARY, "d_model": 256, "encoder_layers": 3, "decoder_layers": 3, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 768, "decoder_ffn_dim": 768, "max_position_embeddings": 256,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "forced_eos_token_id": 2,
}  # fmt: skip
VISION: dict[str, Any] = {
    "image_size": 64, "patch_size": 8, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_labels": 10,
}  # fmt: skip
SPEECH: dict[str, Any] = {
    "vocab_size": 32, "hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 4, "num_attention_heads": 4,
    "conv_dim": (64,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4, "mask_time_length": 2,
    "layerdrop": 0.0,
}  # fmt: skip
LABELS = whole(10, 8)


def hugging_face(
    name: str, kind: str, model: str, inputs: Callable[[], Inputs], loss: Callable[[Any], Tensor] = own_loss,
    has_switch: bool = True, config: Callable[[Any], Any] | None = None, **sizes: Any,
) -> Specimen:  # fmt: skip
    """A model of transformers, by the name of its class and the fields of its configuration."""

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        cls = getattr(transformers, model)
        made = config(transformers) if config is not None else cls.config_class(**sizes)
        return cls(made)

    def switch(module: Any) -> None:
        module.gradient_checkpointing_enable()

    return Specimen(name, "transformers", kind, make, inputs, loss, switch if has_switch else None)


def _clip(transformers: Any, prefix: str) -> Any:
    text = getattr(transformers, f"{prefix}TextConfig")(**(TEXT | {"projection_dim": 64}))
    vision = getattr(transformers, f"{prefix}VisionConfig")(**(VISION | {"projection_dim": 64}))
    return getattr(transformers, f"{prefix}Config")(text_config=text.to_dict(), vision_config=vision.to_dict())


def _llava(transformers: Any) -> Any:
    text, vision = transformers.LlamaConfig(**GROUPED), transformers.CLIPVisionConfig(**VISION)
    return transformers.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3, image_token_id=3)


def _llava_inputs() -> Inputs:
    ids = torch.randint(4, VOCABULARY, (8, 128))
    ids[:, :64] = 3
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(8, 3, 64, 64)}


def _blip2(transformers: Any) -> Any:
    small = {"vocab_size": VOCABULARY, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = transformers.OPTConfig(
        **small, ffn_dim=768, word_embed_proj_dim=256, max_position_embeddings=256, pad_token_id=0, bos_token_id=1,
        eos_token_id=2,
    )  # fmt: skip
    vision = transformers.Blip2VisionConfig(**{k: v for k, v in VISION.items() if k != "num_labels"})
    former = transformers.Blip2QFormerConfig(**small, intermediate_size=768, encoder_hidden_size=256)
    return transformers.Blip2Config(
        vision_config=vision.to_dict(), qformer_config=former.to_dict(), text_config=text.to_dict(),
        num_query_tokens=16, image_token_index=3,
    )  # fmt: skip


def _blip2_inputs() -> Inputs:
    ids = torch.randint(4, VOCABULARY, (8, 96))
    ids[:, :16] = 3
    return {"input_ids": ids, "labels": ids.clone(), "pixel_values": torch.randn(8, 3, 64, 64)}


def _t5_sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "d_model": 256, "d_kv": 64, "d_ff": 768, "num_layers": 3, "num_heads": 4,
        "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip


TRANSFORMERS = (
    hugging_face("GPT-2", "decoder", "GPT2LMHeadModel", tokens(), vocab_size=VOCABULARY, n_embd=256, n_layer=4,
                 n_head=4, n_positions=256, bos_token_id=1, eos_token_id=2),
    hugging_face("GPT-NeoX", "decoder", "GPTNeoXForCausalLM", tokens(), **TEXT),
    hugging_face("GPT-J", "decoder", "GPTJForCausalLM", tokens(), vocab_size=VOCABULARY, n_embd=256, n_layer=4,
                 n_head=4, n_positions=256, rotary_dim=32, bos_token_id=1, eos_token_id=2),
    hugging_face("OPT", "decoder", "OPTForCausalLM", tokens(), **(TEXT | {"ffn_dim": 768, "word_embed_proj_dim": 256})),
    hugging_face("BLOOM", "decoder", "BloomForCausalLM", tokens(), vocab_size=VOCABULARY, hidden_size=256, n_layer=4,
                 n_head=4, bos_token_id=1, eos_token_id=2),
    hugging_face("Falcon", "decoder", "FalconForCausalLM", tokens(), **TEXT),
    hugging_face("Llama", "decoder", "LlamaForCausalLM", tokens(attention_mask=padded), **GROUPED),
    hugging_face("Mistral", "decoder", "MistralForCausalLM", tokens(), **(GROUPED | {"sliding_window": 64})),
    hugging_face("Qwen2", "decoder", "Qwen2ForCausalLM", tokens(), **GROUPED),
    hugging_face("Qwen3", "decoder", "Qwen3ForCausalLM", tokens(), **(GROUPED | {"head_dim": 64})),
    hugging_face("Gemma 2", "decoder", "Gemma2ForCausalLM", tokens(), **(GROUPED | {"head_dim": 64})),
    hugging_face("Gemma 3", "decoder", "Gemma3ForCausalLM", tokens(), **(GROUPED | {"head_dim": 64})),
    hugging_face("Phi-3", "decoder", "Phi3ForCausalLM", tokens(), **GROUPED),
    hugging_face("Mixtral", "mixture of experts", "MixtralForCausalLM", tokens(),
                 **(EXPERTS | {"num_local_experts": 4, "output_router_logits": True})),
    hugging_face("Qwen3-MoE", "mixture of experts", "Qwen3MoeForCausalLM", tokens(),
                 **(EXPERTS | {"num_experts": 4, "head_dim": 64})),
    hugging_face("OLMoE", "mixture of experts", "OlmoeForCausalLM", tokens(), **(EXPERTS | {"num_experts": 4})),
    hugging_face("DeepSeek-V3", "mixture of experts", "DeepseekV3ForCausalLM", tokens(), **(EXPERTS | {
        "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 64,
        "kv_lora_rank": 64, "qk_rope_head_dim": 16, "qk_nope_head_dim": 48, "v_head_dim": 64,
        "first_k_dense_replace": 1})),
    hugging_face("gpt-oss", "mixture of experts", "GptOssForCausalLM", tokens(),
                 **(EXPERTS | {"num_local_experts": 4, "head_dim": 64})),
    hugging_face("Switch Transformers", "mixture of experts", "SwitchTransformersForConditionalGeneration",
                 tokens(batch=2, length=64), **(_t5_sizes() | {"num_experts": 4, "num_decoder_layers": 3,
                 "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1})),
    hugging_face("BERT", "encoder", "BertForMaskedLM", tokens(attention_mask=padded), **TEXT),
    hugging_face("RoBERTa", "encoder", "RobertaForMaskedLM", tokens(), **TEXT),
    hugging_face("ALBERT", "encoder", "AlbertForMaskedLM", tokens(), has_switch=False,
                 **(TEXT | {"embedding_size": 64})),
    hugging_face("ELECTRA", "encoder", "ElectraForMaskedLM", tokens(), **(TEXT | {"embedding_size": 64})),
    hugging_face("DistilBERT", "encoder", "DistilBertForMaskedLM", tokens(), vocab_size=VOCABULARY, dim=256,
                 hidden_dim=768, n_layers=4, n_heads=4),
    hugging_face("DeBERTa-v2", "encoder", "DebertaV2ForMaskedLM", tokens(), **(TEXT | {
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 32})),
    hugging_face("ModernBERT", "encoder", "ModernBertForMaskedLM", tokens(), **(TEXT | {"cls_token_id": 1,
                 "sep_token_id": 2})),
    hugging_face("Longformer", "encoder", "LongformerForMaskedLM", tokens(), **(TEXT | {"attention_window": 32,
                 "max_position_embeddings": 260, "pad_token_id": 1})),
    hugging_face("T5", "encoder-decoder", "T5ForConditionalGeneration", tokens(attention_mask=padded), **_t5_sizes()),
    hugging_face("BART", "encoder-decoder", "BartForConditionalGeneration", tokens(), **SEQ2SEQ),
    hugging_face("Pegasus", "encoder-decoder", "PegasusForConditionalGeneration", tokens(), **SEQ2SEQ),
    hugging_face("Mamba", "state space", "MambaForCausalLM", tokens(batch=4, length=32), vocab_size=VOCABULARY,
                 hidden_size=128, num_hidden_layers=3, pad_token_id=0),
    hugging_face("Mamba-2", "state space", "Mamba2ForCausalLM", tokens(batch=4), vocab_size=VOCABULARY, hidden_size=128,
                 num_hidden_layers=3, num_heads=8, head_dim=32, n_groups=2, state_size=32, chunk_size=32),
    hugging_face("RWKV", "state space", "RwkvForCausalLM", tokens(batch=4, length=32), vocab_size=VOCABULARY,
                 hidden_size=128, attention_hidden_size=128, num_hidden_layers=3, context_length=64),
    hugging_face("ViT", "vision", "ViTForImageClassification", images(labels=LABELS), **VISION),
    hugging_face("DINOv2", "vision", "Dinov2ForImageClassification", images(labels=LABELS), **VISION),
    hugging_face("BEiT", "vision", "BeitForImageClassification", images(labels=LABELS), **VISION),
    hugging_face("ViT-MAE", "vision", "ViTMAEForPreTraining", images(), **(VISION | {
        "decoder_hidden_size": 128, "decoder_intermediate_size": 384, "decoder_num_hidden_layers": 2,
        "decoder_num_attention_heads": 4})),
    hugging_face("Swin", "vision", "SwinForImageClassification", images(labels=LABELS), image_size=64, patch_size=2,
                 embed_dim=32, depths=[2, 2, 2], num_heads=[2, 4, 8], window_size=4, num_labels=10),
    hugging_face("ConvNeXt", "vision", "ConvNextForImageClassification", images(labels=LABELS),
                 has_switch=False, hidden_sizes=[32, 64, 128, 256], depths=[2, 2, 2, 2], num_labels=10),
    hugging_face("SegFormer", "vision", "SegformerForSemanticSegmentation", images(labels=whole(10, 8, 64, 64)),
                 hidden_sizes=[16, 32, 64, 128], depths=[2, 2, 2, 2], num_attention_heads=[1, 2, 4, 8],
                 decoder_hidden_size=64, num_labels=10),
    hugging_face("wav2vec 2.0", "speech", "Wav2Vec2ForCTC", given(input_values=noise(4, 16000),
                 labels=whole(31, 4, 20)), **SPEECH),
    hugging_face("HuBERT", "speech", "HubertForCTC", given(input_values=noise(4, 16000), labels=whole(31, 4, 20)),
                 **SPEECH),
    hugging_face("Whisper", "speech", "WhisperForConditionalGeneration", given(input_features=noise(4, 80, 200),
                 labels=whole(500, 4, 48)), **(SEQ2SEQ | {"max_source_positions": 100, "max_target_positions": 64,
                 "suppress_tokens": None, "begin_suppress_tokens": None})),
    hugging_face("CLIP", "multimodal", "CLIPModel", given(input_ids=whole(500, 8, 64), pixel_values=noise(8, 3, 64, 64),
                 return_loss=lambda: True), config=lambda t: _clip(t, "CLIP")),
    hugging_face("SigLIP", "multimodal", "SiglipModel", given(input_ids=whole(500, 8, 64),
                 pixel_values=noise(8, 3, 64, 64), return_loss=lambda: True), config=lambda t: _clip(t, "Siglip")),
    hugging_face("LLaVA", "multimodal", "LlavaForConditionalGeneration", _llava_inputs, config=_llava),
    hugging_face("BLIP-2", "multimodal", "Blip2ForConditionalGeneration", _blip2_inputs, config=_blip2),
    hugging_face("PatchTST", "time series", "PatchTSTForPrediction", given(past_values=noise(16, 256, 4),
                 future_values=noise(16, 24, 4)), has_switch=False, num_input_channels=4, context_length=256,
                 patch_length=8, patch_stride=8, d_model=128, num_hidden_layers=3, num_attention_heads=4, ffn_dim=256,
                 prediction_length=24),
)  # fmt: skip


# ---- diffusers -------------------------------------------------------------------------------------------------------


def diffuser(
    name: str, model: str, inputs: Callable[[], Inputs], loss: Callable[[Any], Tensor] = mean_square, **sizes: Any
) -> Specimen:
    """A model of diffusers, by the name of its class and its arguments."""

    def make() -> nn.Module:
        return getattr(importlib.import_module("diffusers"), model)(**sizes).train()

    def switch(module: Any) -> None:
        module.enable_gradient_checkpointing()

    return Specimen(name, "diffusers", "diffusion", make, inputs, loss, switch)


DIFFUSERS = (
    diffuser("U-Net", "UNet2DModel", given(sample=noise(4, 3, 32, 32), timestep=whole(1000, 4)), sample_size=32,
             block_out_channels=(32, 64, 64), layers_per_block=2, norm_num_groups=8,
             down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")),
    diffuser("U-Net with text", "UNet2DConditionModel", given(sample=noise(4, 4, 32, 32), timestep=whole(1000, 4),
             encoder_hidden_states=noise(4, 16, 64)), sample_size=32, block_out_channels=(32, 64),
             layers_per_block=2, norm_num_groups=8, cross_attention_dim=64, attention_head_dim=8,
             down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")),
    diffuser("AutoencoderKL", "AutoencoderKL", given(sample=noise(4, 3, 64, 64)), block_out_channels=(32, 64),
             layers_per_block=2, norm_num_groups=8, latent_channels=4,
             down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
    diffuser("DiT", "DiTTransformer2DModel", given(hidden_states=noise(4, 4, 16, 16), timestep=whole(1000, 4),
             class_labels=whole(10, 4)), num_attention_heads=4, attention_head_dim=64, in_channels=4,
             out_channels=8, num_layers=4, sample_size=16, patch_size=2, num_embeds_ada_norm=1000),
    diffuser("Flux", "FluxTransformer2DModel", given(hidden_states=noise(4, 64, 16),
             encoder_hidden_states=noise(4, 32, 64), pooled_projections=noise(4, 32), timestep=noise(4),
             img_ids=noise(64, 3), txt_ids=noise(32, 3)), in_channels=16, num_layers=2, num_single_layers=3,
             attention_head_dim=64, num_attention_heads=4, joint_attention_dim=64, pooled_projection_dim=32,
             axes_dims_rope=(16, 24, 24)),
    diffuser("SD3", "SD3Transformer2DModel", given(hidden_states=noise(4, 4, 32, 32),
             encoder_hidden_states=noise(4, 32, 64), pooled_projections=noise(4, 64), timestep=whole(1000, 4)),
             sample_size=32, patch_size=2, in_channels=4, num_layers=4, attention_head_dim=64,
             num_attention_heads=4, joint_attention_dim=64, caption_projection_dim=256, pooled_projection_dim=64,
             out_channels=4, pos_embed_max_size=32),
)  # fmt: skip


# ---- timm, segmentation models ---------------------------------------------------------------------------------------


def tell_torchvision_of_its_operators() -> None:
    """Define the schemas that torchvision asks for when it is imported beside a torch that it was not built for."""
    with contextlib.suppress(ImportError, RuntimeError):  # operator torchvision::nms does not exist
        importlib.import_module("torchvision")
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _KEPT.append(library)


_KEPT: list[Any] = []
"""Schemas are gone when the library that defined them is."""


def timm(name: str, batch: int = 8, size: int = 96, **options: Any) -> Specimen:
    """A model of timm by its name there."""

    def make() -> nn.Module:
        return importlib.import_module("timm").create_model(name, num_classes=10, **options)

    def switch(module: Any) -> None:
        module.set_grad_checkpointing(True)

    return Specimen(name, "timm", "vision", make, images(batch, size, "x"), first_class, switch)


TIMM = (
    timm("resnet26t", batch=12),
    timm("regnetx_002", batch=32),
    timm("densenet121", batch=12, size=64),
    timm("efficientnet_b0", batch=12),
    timm("mobilenetv3_small_100", batch=48),
    timm("mnasnet_small", batch=48),
    timm("ghostnet_050", batch=32),
    timm("convnext_atto", batch=16),
    timm("repvgg_a0", batch=16),
    timm("dla34", batch=8, size=64),
    timm("vit_tiny_patch16_224", img_size=96, batch=32),
    timm("deit_tiny_patch16_224", img_size=96, batch=32, drop_path_rate=0.1),
    timm("swin_tiny_patch4_window7_224", img_size=96, window_size=3, batch=16, depths=(2, 2, 2, 2), embed_dim=48),
    timm("mixer_s32_224", img_size=96, batch=64),
    timm("poolformer_s12", batch=16),
    timm("coatnet_pico_rw_224", img_size=96, batch=12),
    timm("maxvit_pico_rw_256", img_size=64, size=64, batch=12),
)


def segmenter(architecture: str, encoder: str = "resnet18") -> Specimen:
    """A network of segmentation_models_pytorch."""

    def make() -> nn.Module:
        module = importlib.import_module("segmentation_models_pytorch")
        return getattr(module, architecture)(encoder_name=encoder, encoder_weights=None, classes=4)

    inputs = images(8, 96, "x")
    return Specimen(architecture, "segmentation_models_pytorch", "segmentation", make, inputs, first_class)


SEGMENTATION = (
    segmenter("Unet"), segmenter("UnetPlusPlus", "mobilenet_v2"), segmenter("FPN"), segmenter("DeepLabV3Plus"),
    segmenter("Segformer"),
)  # fmt: skip


# ---- graphs, x-transformers, peft, torch -----------------------------------------------------------------------------


def graph(name: str, **options: Any) -> Specimen:
    """A network of torch_geometric on a random graph."""

    def make() -> nn.Module:
        models = importlib.import_module("torch_geometric.nn.models")
        return getattr(models, name)(32, 128, 4, out_channels=8, dropout=0.2, **options)

    inputs = given(x=noise(2000, 32), edge_index=whole(2000, 2, 12000))
    return Specimen(name, "torch_geometric", "graph", make, inputs, first_class)


def _x_transformer(**options: Any) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        x = importlib.import_module("x_transformers")
        layers = x.Decoder(dim=256, depth=4, heads=4, rotary_pos_emb=True, **options)
        wrapper = x.TransformerWrapper(num_tokens=VOCABULARY, max_seq_len=129, attn_layers=layers)
        return x.AutoregressiveWrapper(wrapper)

    return make


def _lora() -> nn.Module:
    transformers, peft = importlib.import_module("transformers"), importlib.import_module("peft")
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**GROUPED))
    return peft.get_peft_model(base, peft.LoraConfig(r=8, lora_dropout=0.1, target_modules=["q_proj", "v_proj"]))


def _lora_switch(module: Any) -> None:
    module.gradient_checkpointing_enable()
    module.enable_input_require_grads()


class Recurrent(nn.Module):
    """Token embedding, ``nn.LSTM``, head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, 128)
        self.lstm = nn.LSTM(128, 256, num_layers=3, dropout=0.1, batch_first=True)
        self.head = nn.Linear(256, VOCABULARY)

    def forward(self, ids: Tensor) -> Tensor:
        """Logits, classes second."""
        return self.head(self.lstm(self.embed(ids))[0]).transpose(1, 2)


OTHERS = (
    graph("GCN"), graph("GAT", heads=4), graph("GraphSAGE"), graph("GIN"),
    Specimen("decoder", "x_transformers", "decoder", _x_transformer(attn_dropout=0.1, ff_dropout=0.1),
             given(x=whole(VOCABULARY, 8, 129)), lambda loss: loss),
    Specimen("decoder, SwiGLU, RMSNorm", "x_transformers", "decoder",
             _x_transformer(ff_glu=True, ff_swish=True, use_rmsnorm=True, attn_kv_heads=2),
             given(x=whole(VOCABULARY, 8, 129)), lambda loss: loss),
    Specimen("LoRA on Llama", "peft", "decoder", _lora, tokens(), own_loss, _lora_switch),
    Specimen("nn.Transformer", "torch", "encoder-decoder",
             lambda: nn.Transformer(256, 4, 3, 3, 768, dropout=0.1, batch_first=True),
             given(src=noise(8, 128, 256), tgt=noise(8, 128, 256)), mean_square),
    Specimen("nn.LSTM", "torch", "recurrent", Recurrent, given(ids=whole(VOCABULARY, 16, 128)), first_class),
)  # fmt: skip


ZOO: tuple[Specimen, ...] = (*TRANSFORMERS, *DIFFUSERS, *TIMM, *SEGMENTATION, *OTHERS)


def main() -> None:
    """Print the list."""
    for s in ZOO:
        print(f"{s.library:28s} {s.kind:20s} {s.name}{'' if s.switch is None else ' (has a switch)'}")


if __name__ == "__main__":
    main()
