use super::*;
use proptest::prelude::*;
use std::path::Path;

const TEXTBOOK: &str = r#"{"vocab_size": 50257, "context_length": 256, "emb_dim": 768, "n_heads": 12,
    "n_layers": 12, "drop_rate": 0.1, "qkv_bias": false}"#;
const NANOGPT: &str = r#"{"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "bias": false,
    "vocab_size": 65, "dropout": 0.2}"#;
const HPARAMS: &str = r#"{"n_vocab": 50257, "n_ctx": 1024, "n_embd": 1600, "n_head": 25, "n_layer": 48}"#;

fn parsed(text: &str) -> Config {
    Config::from_json(text).unwrap_or_else(|error| panic!("{text}: {error}"))
}

#[test]
fn presets_have_the_published_parameter_counts() {
    for (name, tied, with_head) in [
        ("gpt2", 124_439_808, 163_037_184),
        ("gpt2-medium", 354_823_168, 406_286_336),
        ("gpt2-large", 774_030_080, 838_359_040),
        ("openai-community/gpt2-xl", 1_557_611_200, 1_638_022_400),
    ] {
        let config = Config::preset(name).unwrap();
        assert_eq!(config.num_parameters(false), tied, "{name}");
        assert_eq!(config.num_parameters(true), with_head, "{name}");
        assert_eq!(config.head_size(), 64, "{name}");
    }
    let untied = Config { tie_word_embeddings: false, ..Config::preset("gpt2").unwrap() };
    assert_eq!(untied.num_parameters(false), 163_037_184);
    assert_eq!(untied.num_parameters(true), 163_037_184);
}

#[test]
fn an_unknown_preset_is_named() {
    for name in ["gpt3", "", "GPT2", "openai-community/", "openai/gpt2"] {
        let message = Config::preset(name).unwrap_err().to_string();
        assert!(message.contains(&format!("{name:?}")), "{message}");
    }
}

#[test]
fn every_golden_config_reads_and_survives_being_written() {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases");
    let mut seen = 0;
    for case in std::fs::read_dir(cases).unwrap() {
        let Ok(text) = std::fs::read_to_string(case.unwrap().path().join("config.json")) else { continue };
        let config = parsed(&text);
        assert_eq!(parsed(&config.to_json()), config);
        seen += 1;
    }
    assert!(seen >= 13, "{seen} configs");
}

#[test]
fn a_hugging_face_config_is_read_field_by_field() {
    let config = parsed(
        r#"{"activation_function": "gelu_pytorch_tanh", "bos_token_id": 1, "eos_token_id": [2, 0],
            "dtype": "bfloat16", "torch_dtype": "float32", "layer_norm_epsilon": 1e-06, "model_type": "gpt2",
            "n_embd": 60, "n_head": 3, "n_inner": 100, "n_layer": 3, "n_positions": 48, "n_ctx": 1024,
            "scale_attn_by_inverse_layer_idx": true, "scale_attn_weights": false,
            "tie_word_embeddings": false, "vocab_size": 777, "add_cross_attention": false}"#,
    );
    let expected = Config {
        n_vocab: 777,
        n_ctx: 48,
        n_embd: 60,
        n_layer: 3,
        n_head: 3,
        n_inner: 100,
        layer_norm_epsilon: 1e-6,
        activation_function: Activation::GeluNew,
        activation_name: "gelu_pytorch_tanh",
        scale_attn_weights: false,
        scale_attn_by_inverse_layer_idx: true,
        tie_word_embeddings: false,
        bos_token_id: Some(1),
        eos_token_ids: vec![2, 0],
        dtype: Some("bfloat16".to_owned()),
    };
    assert_eq!(config, expected);
    assert_eq!(parsed(&config.to_json()), expected);
}

#[test]
fn other_programs_configs_are_read_with_what_those_take_for_granted() {
    let textbook = parsed(TEXTBOOK);
    assert_eq!((textbook.n_ctx, textbook.n_embd, textbook.n_layer, textbook.n_head), (256, 768, 12, 12));
    assert_eq!(textbook.activation_function, Activation::GeluNew);
    assert!(!textbook.tie_word_embeddings);
    assert_eq!(textbook.eos_token_ids, [50256]);

    let nanogpt = parsed(NANOGPT);
    assert_eq!((nanogpt.n_vocab, nanogpt.n_ctx, nanogpt.n_inner), (65, 256, 1536));
    assert_eq!(nanogpt.activation_function, Activation::Gelu);
    assert!(nanogpt.tie_word_embeddings);
    assert_eq!((nanogpt.bos_token_id, nanogpt.eos_token_ids.len()), (None, 0));

    assert_eq!(parsed(HPARAMS), Config::preset("gpt2-xl").unwrap());
    assert_eq!(parsed(r#"{"model_type": "gpt2"}"#), Config::preset("gpt2").unwrap());
    let aliases = r#"{"model_type": "gpt2", "hidden_size": 1024, "num_hidden_layers": 24,
        "num_attention_heads": 16, "max_position_embeddings": 1024, "torch_dtype": "torch.float16"}"#;
    let medium = Config { dtype: Some("float16".to_owned()), ..Config::preset("gpt2-medium").unwrap() };
    assert_eq!(parsed(aliases), medium);
}

#[test]
fn ends_of_text_are_those_that_the_vocabulary_has() {
    let ends = |fields: &str| {
        let config = parsed(&format!(r#"{{"model_type": "gpt2", {fields}}}"#));
        (config.bos_token_id, config.eos_token_ids)
    };
    assert_eq!(ends(r#""vocab_size": 50257"#), (Some(50256), vec![50256]));
    assert_eq!(ends(r#""vocab_size": 1000"#), (None, vec![]));
    assert_eq!(ends(r#""bos_token_id": null, "eos_token_id": null"#), (None, vec![]));
    assert_eq!(ends(r#""eos_token_id": [7, 4294967295, 9]"#), (Some(50256), vec![7, 9]));
}

#[test]
fn activations_go_by_all_their_names() {
    for (name, function) in ACTIVATIONS {
        let config = parsed(&format!(r#"{{"model_type": "gpt2", "activation_function": "{name}"}}"#));
        assert_eq!((config.activation_name, config.activation_function), (name, function));
        assert_eq!(parsed(&config.to_json()).activation_name, name);
    }
}

#[test]
fn attention_scales_follow_the_config() {
    let plain = Config::preset("gpt2").unwrap();
    assert_eq!(plain.attn_scale(5), 0.125);
    let by_layer = Config { scale_attn_by_inverse_layer_idx: true, ..plain.clone() };
    assert_eq!(by_layer.attn_scale(0), 0.125);
    assert_eq!(by_layer.attn_scale(3), 0.03125);
    let unscaled = Config { scale_attn_weights: false, ..by_layer };
    assert_eq!(unscaled.attn_scale(1), 0.5);
}

#[test]
fn the_largest_config_overflows_nothing() {
    let config = parsed(&format!(
        r#"{{"vocab_size": {MAX_VOCAB}, "n_positions": {MAX_CTX}, "n_embd": {MAX_EMBD}, "n_head": 1,
            "n_inner": {MAX_INNER}, "n_layer": {MAX_LAYER}, "tie_word_embeddings": false}}"#
    ));
    assert!(config.num_parameters(true) < 1 << 53);
}

#[test]
fn a_config_written_in_one_line_still_names_the_field_with_nan() {
    let long = r#"{"activation_function": "gelu_new", "layer_norm_epsilon": NaN, "model_type": "gpt2", "n_embd": 64}"#;
    let message = Config::from_json(long).unwrap_err().to_string();
    assert!(message.contains("layer_norm_epsilon"), "{message}");
}

/// Values that a field may hold by mistake or malice.
fn any_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (0u64..64).prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        "\\PC*".prop_map(Value::from),
        prop::collection::vec(any::<u32>(), 0..4).prop_map(Value::from),
    ]
}

/// A field's name: mostly one that means something.
fn any_field() -> impl Strategy<Value = String> {
    let known = [N_VOCAB, N_POSITIONS, N_EMBD, N_LAYER, N_HEAD].concat();
    let others = [
        "n_ctx",
        "n_inner",
        "layer_norm_epsilon",
        "activation_function",
        "scale_attn_weights",
        "scale_attn_by_inverse_layer_idx",
        "tie_word_embeddings",
        "bos_token_id",
        "eos_token_id",
        "dtype",
        "torch_dtype",
        "add_cross_attention",
    ];
    prop::sample::select([known, others.to_vec()].concat()).prop_map(str::to_owned)
}

proptest! {
    #[test]
    fn whatever_a_config_says_it_is_read_or_refused_by_name(
        changes in prop::collection::vec((any_field(), any_value()), 1..3)
    ) {
        let mut object: Value = serde_json::from_str(&Config::preset("gpt2").unwrap().to_json()).unwrap();
        for (field, value) in &changes {
            object[field.as_str()] = value.clone();
        }
        match Config::from_json(&object.to_string()) {
            Ok(config) => {
                prop_assert!(config.n_embd == config.n_head * config.head_size());
                prop_assert!(config.num_parameters(true) < 1 << 53);
                prop_assert_eq!(Config::from_json(&config.to_json()).unwrap(), config);
            }
            // n_head is at fault when a changed n_embd no longer divides.
            Err(error) => {
                let message = error.to_string();
                prop_assert!(message.len() < 400, "{}", message);
                let names_it = |field: &str| {
                    [' ', ':'].iter().any(|end| message.contains(&format!("{field}{end}")))
                };
                prop_assert!(names_it("n_head") || changes.iter().any(|(field, _)| names_it(field)), "{}", message);
            }
        }
    }

    #[test]
    fn text_that_is_no_config_is_refused(text in "\\PC*") {
        prop_assert!(Config::from_json(&text).is_err());
    }
}
