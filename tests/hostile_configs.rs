//! Configs that lie: each must be refused with a message that names the field, what it may be and what it is.

use gpt2rs::config::Config;
use serde_json::{Value, json};

/// A published model's config with one field changed, and what the message must name.
#[test]
fn each_bad_config_field_is_named() {
    let good: Value = serde_json::from_str(&Config::preset("gpt2").unwrap().to_json()).unwrap();
    let huge = u64::MAX;
    let lies: Vec<(&str, Value, &[&str])> = vec![
        ("n_head", json!(0), &["from 1", "found 0"]),
        ("n_head", json!(5), &["divisor", "768", "found 5"]),
        ("n_head", json!(-12), &["found -12"]),
        ("n_head", json!(true), &["found true", "boolean"]),
        ("n_embd", json!(0), &["from 1"]),
        ("n_embd", json!("768"), &["\"768\"", "a string"]),
        ("n_embd", json!(768.0), &["768.0"]),
        ("n_embd", json!(null), &["null"]),
        ("n_embd", json!([768]), &["a list"]),
        ("n_embd", json!(huge), &["18446744073709551615"]),
        ("n_embd", json!(1 << 20), &["131072"]),
        ("n_layer", json!(-1), &["found -1"]),
        ("n_layer", json!(1u64 << 40), &["16384"]),
        ("n_positions", json!(0), &["from 1"]),
        ("n_positions", json!({"x": 1}), &["an object"]),
        ("n_ctx", json!("1024"), &["a string"]),
        ("vocab_size", json!(0), &["from 1"]),
        ("vocab_size", json!(-50257), &["-50257"]),
        ("vocab_size", json!(1u64 << 33), &["8589934592"]),
        ("vocab_size", json!(5.5), &["5.5"]),
        ("n_inner", json!(0), &["from 1"]),
        ("n_inner", json!("3072"), &["a string"]),
        ("n_inner", json!(huge), &["1048576"]),
        ("layer_norm_epsilon", json!(0.0), &["above 0"]),
        ("layer_norm_epsilon", json!(-1e-5), &["-0.00001"]),
        ("layer_norm_epsilon", json!("1e-5"), &["a string"]),
        ("layer_norm_epsilon", json!("NaN"), &["NaN"]),
        ("layer_norm_epsilon", json!(null), &["null"]),
        ("layer_norm_epsilon", json!(1e-60), &["1e-60"]),
        ("layer_norm_epsilon", json!(1e60), &["1e+60", "finite"]),
        ("layer_norm_epsilon", json!(true), &["boolean"]),
        ("activation_function", json!("quick_gelu"), &["quick_gelu", "gelu_new", "swish"]),
        ("activation_function", json!(null), &["null"]),
        ("activation_function", json!(3), &["found 3"]),
        ("scale_attn_weights", json!(1), &["true or false", "found 1"]),
        ("scale_attn_by_inverse_layer_idx", json!("no"), &["true or false"]),
        ("tie_word_embeddings", json!(null), &["true or false"]),
        ("add_cross_attention", json!(true), &["cross-attention"]),
        ("add_cross_attention", json!("true"), &["true or false"]),
        ("model_type", json!("llama"), &["llama", "gpt2"]),
        ("model_type", json!(null), &["null"]),
        ("bos_token_id", json!(-1), &["-1"]),
        ("eos_token_id", json!("<|endoftext|>"), &["a string"]),
        ("eos_token_id", json!([1, "2"]), &["\"2\""]),
        ("eos_token_id", json!(1u64 << 32), &["4294967296"]),
        ("torch_dtype", json!(32), &["found 32"]),
        ("hidden_size", json!(1024), &["n_embd", "768", "1024", "agree"]),
        ("num_attention_heads", json!(0), &["from 1"]),
        ("num_hidden_layers", json!(6), &["n_layer", "agree"]),
        ("max_position_embeddings", json!(512), &["n_positions", "agree"]),
    ];
    for (field, value, words) in lies {
        let mut config = good.clone();
        config[field] = value.clone();
        let message = Config::from_json(&config.to_string()).expect_err(field).to_string();
        for word in [&[field], words].concat() {
            assert!(message.contains(word), "{field} = {value}: {message:?} lacks {word:?}");
        }
    }
}

#[test]
fn text_that_is_no_config_is_refused() {
    let deep = "[".repeat(100_000);
    let wide = format!("{{\"x\": [{}0]}}", "0,".repeat(600_000));
    for (text, word) in [
        ("", "JSON"),
        ("null", "object"),
        ("[]", "object"),
        ("\"n_embd\"", "object"),
        ("{", "JSON"),
        ("{}", "vocab_size"),
        (r#"{"vocab_size": 10, "n_positions": 4, "n_layer": 1, "n_head": 1}"#, "n_embd"),
        (r#"{"vocab_size": 10, "n_embd": 4, "n_layer": 1, "n_head": 1}"#, "n_positions"),
        (r#"{"n_layer": 1, "layer_norm_epsilon": NaN}"#, "layer_norm_epsilon"),
        (r#"{"n_layer": 1, "layer_norm_epsilon": -Infinity}"#, "layer_norm_epsilon"),
        (r#"{"n_layer": 1, "layer_norm_epsilon": 1e999}"#, "layer_norm_epsilon"),
        ("{\n  \"n_embd\": 0x10,\n  \"n_layer\": 1\n}", "n_embd"),
        (&deep, "JSON"),
        (&wide, "1048576"),
    ] {
        let message = Config::from_json(text).unwrap_err().to_string();
        assert!(message.contains(word) && message.len() < 500, "{message}");
    }
}
