//! The reference cases: checkpoint folders in `tests/golden/cases`.

use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use std::fs;
use std::path::{Path, PathBuf};

/// Cases that are safetensors files with Hugging Face's names: tied and untied heads, odd sizes, no blocks, and each type
/// that files are stored in.
#[allow(dead_code)] // Not every binary goes through all of them.
pub const CASES: [&str; 9] = [
    "plain",
    "odd_shapes",
    "untied_relu_layer_scaled",
    "unscaled_attention",
    "published_names",
    "bfloat16",
    "float16_sharded",
    "no_blocks",
    "one_wide_head",
];

/// A case's folder.
pub fn folder(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases").join(name)
}

/// Its config and its tensors, of one file or several.
pub fn open(name: &str) -> (Config, Checkpoint) {
    let folder = folder(name);
    let mut files: Vec<PathBuf> = fs::read_dir(&folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "safetensors"))
        .collect();
    files.sort();
    let config = Config::from_json(&fs::read_to_string(folder.join("config.json")).unwrap()).unwrap();
    (config, Checkpoint::open_safetensors(&files).unwrap())
}
