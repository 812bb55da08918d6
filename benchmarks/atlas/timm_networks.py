"""One small network of each of the 98 modules of timm 1.0.31."""

NETWORKS = (
    "eca_botnext26ts_256", "mobileone_s1", "cait_xxs24_224",
    "coat_tiny", "convit_tiny", "convmixer_768_32",
    "convnext_atto_rms", "cpubone_nano", "crossvit_tiny_240",
    "csatv2", "cs3darknet_focus_s", "cspnext_tiny",
    "davit_tiny", "deit_tiny_patch16_224", "densenet121",
    "dla34", "dpn48b", "edgenext_xx_small",
    "efficientformer_l1", "efficientformerv2_s0", "tinynet_e",
    "efficientvim_m1", "efficientvit_b0", "efficientvit_m0",
    "vit_tiny_patch16_dinov3_qkvb", "fasternet_t0", "fastvit_t8",
    "focalnet_tiny_srf", "gcvit_xxtiny", "ghostnet_050",
    "hardcorenas_b", "hgnetv2_b0", "hiera_tiny_224",
    "sam2_hiera_tiny", "hrnet_w18_small", "iformer_t",
    "inception_next_atto", "inception_resnet_v2", "inception_v3",
    "inception_v4", "lcnetv2_small", "levit_128",
    "lowformer_b0", "mambaout_femto", "maxvit_pico_rw_256",
    "poolformer_s12", "mixer_s16_224", "mobilenetv3_small_050",
    "mobilevit_xxs", "mvitv2_tiny", "nest_tiny",
    "nextvit_small", "nf_regnet_b0", "pit_ti_224",
    "pvt_v2_b0", "rdnet_tiny", "regnetx_002",
    "repghostnet_050", "repvit_m1", "res2net50_14w_8s",
    "resnest14d", "resnet14t", "resnetv2_18",
    "rexnet_100", "selecsls42", "legacy_seresnet18",
    "sequencer2d_s", "shvit_s1", "skresnet18",
    "starnet_s050", "swiftformer_xs", "swin_tiny_patch4_window7_224",
    "swinv2_tiny_window8_256", "swinv2_cr_tiny_224", "tiny_vit_5m_224",
    "tnt_s_legacy_patch16_224", "tresnet_m", "twins_svt_small",
    "visformer_tiny", "vit_tiny_patch16_224", "vit_tiny_r_s16_p8_224",
    "vit_srelpos_small_patch16_224", "vitamin_small_224", "volo_d1_224",
    "ese_vovnet19b_slim_dw", "legacy_xception", "xception41p",
    "xcit_nano_12_p8_224",
)  # fmt: skip
"""Those under 60 million weights."""

LARGER = (
    "beit_base_patch16_224", "deepseek_vit_412m", "gemma4_vit_167m",
    "mobilenetv5_300m", "naflexvit_base_patch16_gap", "nasnetalarge",
    "pnasnet5large", "qwen3_vit_88m", "samvit_base_patch16_224",
    "vgg11_bn",
)  # fmt: skip
"""The smallest of the other modules."""
