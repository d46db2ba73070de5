//! Packed files: the same bits as the model they were made of, and a clear error for each that lies.

use cases::CASES;
use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::config::Config;
use gpt2rs::error::{Error, Result};
use gpt2rs::mapped::{Arena, Slab};
use gpt2rs::model::{Model, Options};
use gpt2rs::packed::{Packed, layout};
use gpt2rs::save::save_packed;
use gpt2rs::session;
use gpt2rs::simd::Isa;
use gpt2rs::weights::{Dtype, Origin};
use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::fs::{self, File};
use std::path::Path;
use tempfile::TempDir;

mod cases;

const DTYPES: [Dtype; 4] = [Dtype::F32, Dtype::BF16, Dtype::Int8, Dtype::Int4];
fn options(dtype: Dtype) -> Options {
    Options { dtype, n_threads: Some(2), ..Options::default() }
}

/// The model of a reference case, packed in memory.
fn case(name: &str, dtype: Dtype) -> Model {
    let (config, checkpoint) = cases::open(name);
    Model::new(config, Origin::Checkpoint(&checkpoint), options(dtype)).unwrap()
}

fn save(model: &Model, path: &Path) {
    save_packed(model.config(), model.weights(), model.dtype(), path).unwrap();
}

/// Opens a packed file as what it says that it is.
fn open(path: &Path, isa: Option<Isa>) -> Result<Model> {
    let checkpoint = Checkpoint::open_safetensors(&[path])?;
    let Some(Packed { config, dtype, .. }) = Packed::of(&checkpoint)? else {
        return Err(Error::UnknownDtype { name: "no packed file".to_owned() });
    };
    Model::new(config, Origin::Checkpoint(&checkpoint), Options { isa, ..options(dtype) })
}

fn logits(model: &Model) -> Vec<u32> {
    let Config { n_vocab, n_ctx, .. } = *model.config();
    let tokens: Vec<u32> = (0..n_ctx.min(7) as u32).map(|i| i * 5 % n_vocab as u32).collect();
    let logits = session::logits(model, &tokens, &|| true).unwrap();
    // Which of the NaNs a processor makes is its own affair.
    logits.iter().map(|x| if x.is_nan() { f32::NAN.to_bits() } else { x.to_bits() }).collect()
}

#[test]
fn every_case_opens_with_the_same_bits() {
    let folder = TempDir::new().unwrap();
    let (path, again) = (folder.path().join("packed"), folder.path().join("again"));
    for name in CASES {
        for dtype in DTYPES {
            let model = case(name, dtype);
            save(&model, &path);
            let opened = open(&path, None).unwrap();
            assert_eq!(opened.config(), model.config(), "{name}");
            assert_eq!(opened.weights().bytes(), model.weights().bytes(), "{name}");
            assert_eq!(logits(&opened), logits(&model), "{name} {dtype:?}");
            save(&opened, &again);
            assert!(fs::read(&again).unwrap() == fs::read(&path).unwrap(), "{name} {dtype:?}");
        }
    }
}

/// Large enough for huge pages, where a system has them for files.
#[test]
fn a_larger_model_opens_with_the_same_bits() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("packed");
    let text = r#"{"vocab_size": 9001, "n_positions": 16, "n_embd": 330, "n_layer": 1, "n_head": 3}"#;
    for dtype in DTYPES {
        let model =
            Model::new(Config::from_json(text).unwrap(), Origin::Random { seed: 1 }, options(dtype)).unwrap();
        save(&model, &path);
        assert!(logits(&open(&path, None).unwrap()) == logits(&model), "{dtype:?}");
        // What is mapped stays what it was when another file takes its place.
        let opened = open(&path, None).unwrap();
        let beside = folder.path().join("beside");
        save(&case("plain", dtype), &beside);
        fs::rename(&beside, &path).unwrap();
        assert!(logits(&opened) == logits(&model), "{dtype:?}");
    }
}

/// A piece of a mapped file is that piece; what is too short for a huge page is not mapped.
#[test]
fn mapped_bytes_are_those_of_the_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("bytes");
    let bytes: Vec<u8> = (0..9_000_001_u32).map(|i| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    fs::write(&path, &bytes).unwrap();
    let file = File::open(&path).unwrap();
    assert!(Arena::of_file(&file, 1 << 20).is_none());
    if let Some(arena) = Arena::of_file(&file, bytes.len()) {
        let arena = arena.freeze();
        for range in [0..1, 64..4_200_000, 8_388_608..9_000_001] {
            assert!(Slab::new(&arena, range.clone()).bytes() == &bytes[range]);
        }
    }
}

#[test]
fn other_tools_read_the_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("packed");
    let model = case("untied_relu_layer_scaled", Dtype::Int4);
    save(&model, &path);
    let bytes = fs::read(&path).unwrap();
    let (header_len, header) = SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!((8 + header_len) % 4096, 0);
    let metadata = header.metadata().as_ref().unwrap();
    assert_eq!(metadata["format"], "gpt2rs");
    assert_eq!(metadata["layout"], layout(Dtype::Int4));
    assert_eq!(metadata["dtype"], "int4");
    assert_eq!(&Config::from_json(&metadata["config"]).unwrap(), model.config());
    let mut matrices = 0;
    for (name, info) in header.tensors() {
        if info.dtype == safetensors::Dtype::U8 {
            matrices += 1;
            assert_eq!(info.data_offsets.0 % 64, 0, "{name}");
        } else {
            assert_eq!(info.dtype, safetensors::Dtype::F32, "{name}");
        }
    }
    assert_eq!(matrices, 2 + 4 * model.config().n_layer);
    assert!(header.tensors().contains_key("transformer.h.0.attn.c_attn.weight"));
}

#[test]
fn each_type_has_a_layout_of_its_own() {
    for dtype in DTYPES {
        for other in DTYPES {
            assert_eq!(layout(dtype) == layout(other), dtype == other);
        }
    }
}

#[test]
fn what_is_asked_for_must_be_what_the_file_holds() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("packed");
    save(&case("plain", Dtype::Int8), &path);
    let checkpoint = Checkpoint::open_safetensors(&[&path]).unwrap();
    let config = Packed::of(&checkpoint).unwrap().unwrap().config;
    let message = |config: &Config, dtype| {
        let error =
            Model::new(config.clone(), Origin::Checkpoint(&checkpoint), options(dtype)).err().unwrap();
        let message = error.to_string();
        assert!(message.contains(&path.display().to_string()), "{message}");
        message
    };
    for dtype in [Dtype::F32, Dtype::BF16, Dtype::Int4] {
        let message = message(&config, dtype);
        assert!(message.contains("packed as int8") && message.contains(dtype.name()), "{message}");
    }
    let other = Config { layer_norm_epsilon: 1e-6, ..config.clone() };
    assert!(message(&other, Dtype::Int8).contains("own config is another"));
}

/// A packed file taken apart.
#[derive(Clone)]
struct Parts {
    header: serde_json::Map<String, Value>,
    data: Vec<u8>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Parts {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        Parts {
            header: serde_json::from_slice(&bytes[8..8 + length]).unwrap(),
            data: bytes[8 + length..].to_vec(),
        }
    }

    fn write(&self, path: &Path) {
        let mut header = Value::Object(self.header.clone()).to_string();
        let length = (8 + header.len()).next_multiple_of(64) - 8;
        header.extend(std::iter::repeat_n(' ', length - header.len()));
        fs::write(path, [&(length as u64).to_le_bytes()[..], header.as_bytes(), &self.data].concat())
            .unwrap();
    }

    fn say(&mut self, field: &str, value: &str) {
        self.header["__metadata__"][field] = json!(value);
    }

    fn end(&self) -> usize {
        self.data.len()
    }

    fn place(&self, name: &str) -> (usize, usize) {
        let offsets = &self.header[name]["data_offsets"];
        (offsets[0].as_u64().unwrap() as usize, offsets[1].as_u64().unwrap() as usize)
    }

    /// The tensor's bytes, and no hole where they were.
    fn cut(&mut self, name: &str) {
        let (begin, end) = self.place(name);
        self.header.remove(name);
        self.data.drain(begin..end);
        for (_, info) in self.header.iter_mut().filter(|(name, _)| *name != "__metadata__") {
            for i in 0..2 {
                let offset = info["data_offsets"][i].as_u64().unwrap() as usize;
                if offset >= end {
                    info["data_offsets"][i] = json!(offset - (end - begin));
                }
            }
        }
    }

    fn add(&mut self, name: &str, dtype: &str, shape: &[usize], bytes: &[u8]) {
        let (begin, end) = (self.end(), self.end() + bytes.len());
        self.data.extend(bytes);
        self.header
            .insert(name.to_owned(), json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}));
    }
}

/// Address space of this process at its largest, in bytes.
#[cfg(target_os = "linux")]
fn peak_address_space() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

/// Files with one lie each, and words that the message must contain.
#[test]
fn each_lie_is_named() {
    const FILE: &str = "file-of-lies";
    const C_ATTN: &str = "transformer.h.0.attn.c_attn.weight";
    const BIAS: &str = "transformer.h.0.mlp.c_fc.bias";
    let folder = TempDir::new().unwrap();
    let path = folder.path().join(FILE);
    save(&case("plain", Dtype::Int8), &path);
    let whole = Parts::of(&fs::read(&path).unwrap());
    let config = whole.header["__metadata__"]["config"].as_str().unwrap().to_owned();
    let with = |field: &str, value: Value| {
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config[field] = value;
        config.to_string()
    };
    type Lie<'a> = (Box<dyn Fn(&mut Parts) + 'a>, &'a [&'a str]);
    let config_of = |field: &'static str, value: Value| -> Box<dyn Fn(&mut Parts) + '_> {
        let text = with(field, value);
        Box::new(move |parts| parts.say("config", &text))
    };
    let lies: Vec<Lie<'_>> = vec![
        (
            Box::new(|parts| parts.say("layout", "panels-48/int8-32-1088-00000000")),
            &[FILE, "panels-48", "panels-32", "convert the model again"],
        ),
        (
            Box::new(|parts| parts.say("layout", &layout(Dtype::Int4))),
            &[FILE, "int4", "convert the model again"],
        ),
        (Box::new(|parts| parts.say("layout", &"long".repeat(9999))), &[FILE, "convert the model again"]),
        (Box::new(|parts| parts.say("dtype", "int7")), &[FILE, "dtype", "int7", "bfloat16"]),
        // Another type's layout is another.
        (Box::new(|parts| parts.say("dtype", "int4")), &[FILE, "panels-32/int8-"]),
        (
            Box::new(|parts| {
                parts.say("dtype", "float32");
                parts.say("layout", &layout(Dtype::F32));
            }),
            &["tensor wte.weight", "float32", "bytes"],
        ),
        (
            Box::new(|parts| drop(parts.header["__metadata__"].as_object_mut().unwrap().remove("config"))),
            &[FILE, "config"],
        ),
        (Box::new(|parts| parts.say("config", "[]")), &[FILE, "config", "object"]),
        (config_of("n_layer", json!(16384)), &["tensor h.", "missing"]),
        (config_of("n_layer", json!(1)), &["tensor transformer.h.1.", "not one of"]),
        (config_of("vocab_size", json!(8_000_000)), &["tensor wte.weight", "8000000", "bytes"]),
        (config_of("n_positions", json!(16_000_000)), &["tensor wpe.weight", "16000000", "shape"]),
        (config_of("n_inner", json!(1_000_000)), &["tensor h.0.mlp.c_fc.", "1000000"]),
        (config_of("tie_word_embeddings", json!(false)), &["tensor lm_head.weight", "missing"]),
        (Box::new(|parts| parts.cut(C_ATTN)), &["tensor h.0.attn.c_attn.weight", "missing"]),
        (Box::new(|parts| parts.cut(BIAS)), &["tensor h.0.mlp.c_fc.bias", "missing"]),
        (Box::new(|parts| parts.add("extra", "U8", &[64], &[0; 64])), &["tensor extra", "not one of"]),
        (
            Box::new(|parts| {
                parts.cut(C_ATTN);
                parts.add(C_ATTN, "U8", &[64], &[0; 64]);
            }),
            &["tensor h.0.attn.c_attn.weight", "int8", "found 64"],
        ),
        (
            Box::new(|parts| {
                parts.cut(C_ATTN);
                parts.add(C_ATTN, "F32", &[16], &[0; 64]);
            }),
            &[C_ATTN, "U8", "float32", "[16]"],
        ),
        (
            Box::new(|parts| {
                let (begin, end) = parts.place(C_ATTN);
                let bytes = parts.data[begin..end].to_vec();
                parts.cut(C_ATTN);
                parts.add("transformer.h.0.attn.bias", "F32", &[1], &[0; 4]);
                parts.add(C_ATTN, "U8", &[bytes.len()], &bytes);
            }),
            &[C_ATTN, "multiple of 64"],
        ),
        (Box::new(|parts| parts.header[C_ATTN]["shape"] = json!([2, 32])), &[C_ATTN, "[2, 32]"]),
        (Box::new(|parts| parts.header[BIAS]["dtype"] = json!("U8")), &[BIAS]),
        (
            Box::new(|parts| {
                let place = parts.header[C_ATTN]["data_offsets"].clone();
                let shape = parts.header[C_ATTN]["shape"].clone();
                parts.header["transformer.h.0.mlp.c_fc.weight"]["data_offsets"] = place;
                parts.header["transformer.h.0.mlp.c_fc.weight"]["shape"] = shape;
            }),
            &[FILE, "overlap"],
        ),
        (Box::new(|parts| parts.data.truncate(parts.end() - 1)), &[FILE, "bytes"]),
        (Box::new(|parts| parts.data.truncate(100)), &[FILE, "bytes"]),
    ];
    #[cfg(target_os = "linux")]
    let before = peak_address_space();
    for (i, (lie, words)) in lies.into_iter().enumerate() {
        let mut parts = whole.clone();
        lie(&mut parts);
        parts.write(&path);
        let message = open(&path, None).err().unwrap_or_else(|| panic!("lie {i} passes")).to_string();
        for word in words {
            assert!(message.contains(word), "lie {i}: {message:?} lacks {word:?}");
        }
        assert!(message.len() < 1000, "lie {i}: {} bytes", message.len());
    }
    #[cfg(target_os = "linux")]
    assert!(peak_address_space() - before < 512 << 20, "memory for what is only claimed");
    whole.write(&path);
    assert_eq!(logits(&open(&path, None).unwrap()), logits(&case("plain", Dtype::Int8)));
}

/// Every byte of a matrix is a weight: whatever they are, all instruction sets give one answer.
#[test]
fn any_bytes_are_weights() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("packed");
    for name in ["odd_shapes", "plain"] {
        for dtype in DTYPES {
            save(&case(name, dtype), &path);
            let whole = Parts::of(&fs::read(&path).unwrap());
            let end = whole.header.values().filter(|info| info["dtype"] == "U8");
            let end = end.map(|info| info["data_offsets"][1].as_u64().unwrap()).max().unwrap() as usize;
            for seed in 0..4_u32 {
                let mut parts = whole.clone();
                let mut state = seed;
                for byte in &mut parts.data[..end] {
                    state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                    // Seed 0 is noise, with NaN and infinity among the scales; others hit some bytes only.
                    if seed == 0 || state % 97 < seed {
                        *byte = (state >> 24) as u8;
                    }
                }
                parts.write(&path);
                let mut answers =
                    Isa::available().into_iter().map(|isa| logits(&open(&path, Some(isa)).unwrap()));
                let first = answers.next().unwrap();
                for other in answers {
                    assert!(other == first, "{name} {dtype:?} {seed}: instruction sets differ");
                }
            }
        }
    }
}

#[derive(Clone, Debug)]
enum Mutation {
    FlipHeaderBit(Index),
    FlipAnyBit(Index),
    Truncate(Index),
    HeaderLength(u64),
    SwapOffsets(Index, Index),
    Shift(Index, i64),
    Rename(Index, Index),
    Say(&'static str, String),
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let field = prop::sample::select(vec!["format", "layout", "dtype", "config"]);
    prop_oneof![
        8 => any::<Index>().prop_map(Mutation::FlipHeaderBit),
        2 => any::<Index>().prop_map(Mutation::FlipAnyBit),
        2 => any::<Index>().prop_map(Mutation::Truncate),
        1 => any::<u64>().prop_map(Mutation::HeaderLength),
        2 => any::<(Index, Index)>().prop_map(|(a, b)| Mutation::SwapOffsets(a, b)),
        1 => (any::<Index>(), prop_oneof![-200i64..200, any::<i64>()])
            .prop_map(|(tensor, by)| Mutation::Shift(tensor, by)),
        1 => any::<(Index, Index)>().prop_map(|(a, b)| Mutation::Rename(a, b)),
        1 => (field, "\\PC{0,40}").prop_map(|(field, text)| Mutation::Say(field, text)),
    ]
}

impl Mutation {
    fn apply(&self, bytes: &[u8], path: &Path) {
        let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut changed = bytes.to_vec();
        let mut parts = Parts::of(bytes);
        let names: Vec<String> = parts.header.keys().skip(1).cloned().collect();
        match self {
            Mutation::FlipHeaderBit(at) => {
                // Where there is more than padding.
                let text = bytes[..header_end].iter().rposition(|&byte| byte != b' ').unwrap();
                let bit = at.index(8 * text);
                changed[bit / 8] ^= 1 << (bit % 8);
            }
            Mutation::FlipAnyBit(at) => {
                let bit = at.index(8 * bytes.len());
                changed[bit / 8] ^= 1 << (bit % 8);
            }
            Mutation::Truncate(at) => changed.truncate(at.index(bytes.len())),
            Mutation::HeaderLength(length) => changed[..8].copy_from_slice(&length.to_le_bytes()),
            Mutation::SwapOffsets(a, b) => {
                let (a, b) = (a.get(&names), b.get(&names));
                let (x, y) = (parts.header[a].clone(), parts.header[b].clone());
                parts.header[a] = y;
                parts.header[b] = x;
                return parts.write(path);
            }
            Mutation::Shift(tensor, by) => {
                let info = &mut parts.header[tensor.get(&names)];
                for i in 0..2 {
                    let offset = info["data_offsets"][i].as_i64().unwrap();
                    info["data_offsets"][i] = json!(offset.wrapping_add(*by));
                }
                return parts.write(path);
            }
            Mutation::Rename(a, b) => {
                let info = parts.header.remove(a.get(&names)).unwrap();
                parts.header.insert(format!("{}x", b.get(&names)), info);
                return parts.write(path);
            }
            Mutation::Say(field, text) => {
                parts.say(field, text);
                return parts.write(path);
            }
        }
        fs::write(path, changed).unwrap();
    }
}

#[test]
fn mutated_files_compute_or_are_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("packed");
    let originals: Vec<Vec<u8>> =
        [("plain", Dtype::Int8), ("odd_shapes", Dtype::Int4), ("no_blocks", Dtype::F32)]
            .into_iter()
            .map(|(name, dtype)| {
                save(&case(name, dtype), &path);
                fs::read(&path).unwrap()
            })
            .collect();
    let cases = ProptestConfig { cases: 1500, failure_persistence: None, ..ProptestConfig::default() };
    proptest!(cases, |(at in any::<Index>(), change in mutation())| {
        change.apply(&originals[at.index(originals.len())], &path);
        match open(&path, None) {
            Ok(model) => drop(logits(&model)),
            Err(error) => {
                let message = error.to_string();
                let file = path.display().to_string();
                let named = ["tensor ", "no packed file", &file].iter().any(|word| message.contains(word));
                prop_assert!(named, "{message}");
                prop_assert!(message.len() < 3000, "a message of {} bytes", message.len());
            }
        }
    });
}
