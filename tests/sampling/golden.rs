//! Each processor and warper against the probabilities that transformers computes in float64.

use super::{Sampling, Scratch, assert_distribution, sampling};
use gpt2rs::simd::Isa;
use serde_json::Value;

fn settings(given: &Value, prompt_len: usize) -> Sampling {
    let mut settings = Sampling { prompt_len, ..sampling() };
    for (name, value) in given.as_object().unwrap() {
        let number = value.as_f64();
        let count = value.as_u64().map(|count| count as usize);
        match name.as_str() {
            "temperature" => settings.temperature = number.unwrap(),
            "top_k" => settings.top_k = Some(count.unwrap()),
            "top_p" => settings.top_p = Some(number.unwrap()),
            "min_p" => settings.min_p = Some(number.unwrap()),
            "typical_p" => settings.typical_p = Some(number.unwrap()),
            "epsilon_cutoff" => settings.epsilon_cutoff = Some(number.unwrap()),
            "eta_cutoff" => settings.eta_cutoff = Some(number.unwrap()),
            "repetition_penalty" => settings.repetition_penalty = number.unwrap(),
            "no_repeat_ngram_size" => settings.no_repeat_ngram_size = count.unwrap(),
            "suppress_tokens" => settings.suppress_tokens = serde_json::from_value(value.clone()).unwrap(),
            _ => panic!("processors.json has a setting that this test does not know: {name}"),
        }
    }
    settings
}

#[test]
fn equal_to_transformers() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/processors.json");
    let golden: Value = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    let scores: Vec<f32> = serde_json::from_value(golden["scores"].clone()).unwrap();
    let seen: Vec<u32> = serde_json::from_value(golden["seen"].clone()).unwrap();
    let rows = golden["rows"].as_array().unwrap();
    assert!(rows.len() >= 27);
    for row in rows {
        let expected: Vec<f64> = serde_json::from_value(row["probs"].clone()).unwrap();
        let settings = settings(&row["settings"], seen.len());
        for isa in Isa::available() {
            let actual = settings.probabilities(isa, &scores, &seen, &mut Scratch::default()).unwrap();
            assert_distribution(&actual, &expected, &format!("{} on {}", row["settings"], isa.name()));
        }
    }
}
