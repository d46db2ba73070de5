//! Files that lie: thousands of mutated safetensors files, each of which must be read or refused with a
//! message that names the culprit, without a panic and without memory for what the file only claims
//! to hold.

use gpt2rs::checkpoint::Checkpoint;
use gpt2rs::error::Error;
use proptest::prelude::*;
use proptest::sample::Index;
use safetensors::SafeTensors;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use tempfile::TempDir;

/// A safetensors file taken apart: header entries in the order in which they are written, and data.
#[derive(Clone, Debug)]
struct Parts {
    header: Vec<(String, Value)>,
    data: Vec<u8>,
}

impl Parts {
    fn of(bytes: &[u8]) -> Parts {
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let header: Value = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let entries = header.as_object().unwrap();
        Parts {
            header: entries.iter().map(|(name, info)| (name.clone(), info.clone())).collect(),
            data: bytes[8 + length..].to_vec(),
        }
    }

    fn bytes(&self) -> Vec<u8> {
        // By hand, since a JSON object could not hold a name twice.
        let entries: Vec<String> =
            self.header.iter().map(|(name, info)| format!("{}:{info}", json!(name))).collect();
        let header = format!("{{{}}}", entries.join(","));
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(&self.data);
        bytes
    }
}

/// What is done to a file.
#[derive(Clone, Debug)]
enum Mutation {
    FlipHeaderBit(Index),
    FlipAnyBit(Index),
    Truncate(Index),
    Append(usize),
    HeaderLength(u64),
    Set { tensor: Index, field: &'static str, value: Value },
    Dim { tensor: Index, dim: Index, value: u64 },
    Shift { tensor: Index, begin: i64, end: i64 },
    SameOffsets(Index, Index),
    SameName(Index, Index),
    Twice(Index),
    Remove(Index),
    Rename(Index, String),
}

impl Mutation {
    fn apply(&self, bytes: Vec<u8>) -> Vec<u8> {
        let header_end = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let flip = |mut bytes: Vec<u8>, bit: usize| {
            bytes[bit / 8] ^= 1 << (bit % 8);
            bytes
        };
        let mut bytes = bytes;
        match self {
            Mutation::FlipHeaderBit(at) => return flip(bytes, at.index(8 * header_end)),
            Mutation::FlipAnyBit(at) => {
                let bits = 8 * bytes.len();
                return flip(bytes, at.index(bits));
            }
            Mutation::Truncate(at) => {
                bytes.truncate(at.index(bytes.len()));
                return bytes;
            }
            Mutation::Append(more) => {
                bytes.extend(std::iter::repeat_n(0, *more));
                return bytes;
            }
            Mutation::HeaderLength(length) => {
                bytes[..8].copy_from_slice(&length.to_le_bytes());
                return bytes;
            }
            _ => {}
        }
        let mut parts = Parts::of(&bytes);
        let count = parts.header.len();
        if count == 0 {
            return bytes;
        }
        let header = &mut parts.header;
        match self {
            Mutation::Set { tensor, field, value } => {
                if let Some(info) = header[tensor.index(count)].1.as_object_mut() {
                    info.insert((*field).to_owned(), value.clone());
                }
            }
            Mutation::Dim { tensor, dim, value } => {
                if let Some(shape) = header[tensor.index(count)].1["shape"].as_array_mut() {
                    let at = dim.index(shape.len() + 1);
                    shape.insert(at, json!(value));
                    // Half of the time in place of a dimension, else as one more.
                    if value % 2 == 0 && at + 1 < shape.len() {
                        shape.remove(at + 1);
                    }
                }
            }
            Mutation::Shift { tensor, begin, end } => {
                if let Some(offsets) = header[tensor.index(count)].1["data_offsets"].as_array_mut() {
                    for (offset, by) in offsets.iter_mut().zip([begin, end]) {
                        *offset = json!(offset.as_u64().unwrap().wrapping_add_signed(*by));
                    }
                }
            }
            Mutation::SameOffsets(from, to) => {
                let offsets = header[from.index(count)].1["data_offsets"].clone();
                header[to.index(count)].1["data_offsets"] = offsets;
            }
            Mutation::SameName(from, to) => header[to.index(count)].0 = header[from.index(count)].0.clone(),
            Mutation::Twice(at) => header.push(header[at.index(count)].clone()),
            Mutation::Remove(at) => drop(header.remove(at.index(count))),
            Mutation::Rename(at, name) => header[at.index(count)].0.clone_from(name),
            _ => unreachable!("handled on the bytes above"),
        }
        parts.bytes()
    }
}

fn lying_value() -> impl Strategy<Value = Value> {
    prop_oneof![
        Just(Value::Null),
        Just(json!("F32")),
        prop::sample::select(vec!["F16", "BF16", "F64", "BOOL", "I64", "F4", "F6_E2M3", "F128", "f32", ""])
            .prop_map(Value::from),
        any::<u64>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        prop::collection::vec(prop_oneof![any::<u64>(), 0u64..100], 0..6).prop_map(Value::from),
        Just(json!([0, 18446744073709551615u64])),
        Just(json!([18446744073709551615u64, 0])),
        Just(json!([-1, 4])),
        Just(json!([0.0, 4.0])),
        Just(json!(["0", "4"])),
        Just(json!(vec![1; 1000])),
        Just(json!([[[[]]]])),
        Just(json!({"shape": [1]})),
    ]
}

fn mutation() -> impl Strategy<Value = Mutation> {
    let size = prop_oneof![
        0u64..10,
        Just(1 << 31),
        Just(1 << 32),
        Just(u64::MAX),
        Just(u64::MAX / 2),
        (0u32..64).prop_map(|bit| 1 << bit),
        any::<u64>(),
    ];
    let step = prop_oneof![-64i64..64, any::<i64>()];
    let field = prop::sample::select(vec!["dtype", "shape", "data_offsets", "more"]);
    prop_oneof![
        6 => any::<Index>().prop_map(Mutation::FlipHeaderBit),
        1 => any::<Index>().prop_map(Mutation::FlipAnyBit),
        2 => any::<Index>().prop_map(Mutation::Truncate),
        1 => (1usize..100).prop_map(Mutation::Append),
        2 => size.clone().prop_map(Mutation::HeaderLength),
        4 => (any::<Index>(), field, lying_value())
            .prop_map(|(tensor, field, value)| Mutation::Set { tensor, field, value }),
        3 => (any::<Index>(), any::<Index>(), size)
            .prop_map(|(tensor, dim, value)| Mutation::Dim { tensor, dim, value }),
        3 => (any::<Index>(), step.clone(), step)
            .prop_map(|(tensor, begin, end)| Mutation::Shift { tensor, begin, end }),
        2 => any::<(Index, Index)>().prop_map(|(from, to)| Mutation::SameOffsets(from, to)),
        1 => any::<(Index, Index)>().prop_map(|(from, to)| Mutation::SameName(from, to)),
        1 => any::<Index>().prop_map(Mutation::Twice),
        1 => any::<Index>().prop_map(Mutation::Remove),
        1 => (any::<Index>(), "\\PC{0,300}").prop_map(|(at, name)| Mutation::Rename(at, name)),
    ]
}

/// A well-formed file of a few small tensors, empty ones and unusual types among them.
fn small_file() -> impl Strategy<Value = Vec<u8>> {
    let dtype =
        prop::sample::select(vec![("F32", 4), ("F16", 2), ("BF16", 2), ("F64", 8), ("BOOL", 1), ("I64", 8)]);
    let tensor = (dtype, prop::collection::vec(0u64..5, 0..4));
    (prop::collection::vec(tensor, 0..6), any::<bool>()).prop_map(|(tensors, metadata)| {
        let mut parts = Parts { header: Vec::new(), data: Vec::new() };
        if metadata {
            parts.header.push(("__metadata__".to_owned(), json!({"format": "pt"})));
        }
        for (i, ((dtype, size), shape)) in tensors.into_iter().enumerate() {
            let begin = parts.data.len();
            let bytes = size * shape.iter().product::<u64>() as usize;
            parts.data.extend((0..bytes).map(|byte| (31 * byte + i) as u8 & 0x3f));
            let info = json!({"dtype": dtype, "shape": shape, "data_offsets": [begin, begin + bytes]});
            parts.header.push((format!("h.{i}.weight"), info));
        }
        if parts.header.is_empty() {
            parts
                .header
                .push(("none".to_owned(), json!({"dtype": "F32", "shape": [0], "data_offsets": [0, 0]})));
        }
        parts.bytes()
    })
}

fn golden_files() -> Vec<PathBuf> {
    let cases = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases");
    let mut paths: Vec<PathBuf> = std::fs::read_dir(cases)
        .unwrap()
        .flat_map(|case| std::fs::read_dir(case.unwrap().path()).unwrap())
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .collect();
    paths.sort();
    assert!(paths.len() >= 15, "{} golden files", paths.len());
    paths
}

/// Whether this reader may refuse what the `safetensors` crate takes: names that come twice or are
/// endless, endless shapes, and sizes whose overflow hides behind a dimension of 0.
fn stricter(error: &Error) -> bool {
    match error {
        Error::HeaderSyntax { reason, .. } => {
            ["is there twice", "a tensor's name has", "dimensions"].iter().any(|rule| reason.contains(rule))
        }
        Error::TensorTooLarge { shape, .. } => shape.contains(&0),
        _ => false,
    }
}

/// Opens the file and reads all of it; holds the verdict and the values to the `safetensors` crate's.
fn open_and_compare(path: &Path, bytes: &[u8]) -> std::result::Result<(), TestCaseError> {
    std::fs::write(path, bytes).unwrap();
    let theirs = SafeTensors::deserialize(bytes);
    match Checkpoint::open_safetensors(&[path]) {
        Err(error) => {
            let message = error.to_string();
            let named = message.contains(&path.display().to_string()) || message.contains("tensor ");
            prop_assert!(named, "{message}");
            prop_assert!(message.len() < 3000, "a message of {} bytes", message.len());
            prop_assert!(theirs.is_err() || stricter(&error), "refused a valid file: {message}");
        }
        Ok(checkpoint) => {
            let theirs = theirs.map_err(|error| TestCaseError::fail(format!("took a file with: {error}")))?;
            prop_assert_eq!(checkpoint.names().count(), theirs.len());
            for (name, view) in theirs.iter() {
                prop_assert_eq!(checkpoint.shape(name).unwrap(), view.shape());
                let tensor = match checkpoint.get(name) {
                    Ok(tensor) => tensor,
                    Err(error) => {
                        prop_assert!(matches!(error, Error::UnsupportedStoredType { .. }), "{error}");
                        continue;
                    }
                };
                let mut values = vec![0.0; tensor.rows() * tensor.row_len()];
                tensor.read_rows(0..tensor.rows(), &mut values).unwrap();
                if view.dtype() == safetensors::Dtype::F32 {
                    let read: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
                    prop_assert!(read == view.data(), "{name} reads as something else");
                }
            }
        }
    }
    Ok(())
}

/// Address space of this process at its largest, in bytes; counts what was asked for and never touched.
#[cfg(target_os = "linux")]
fn peak_address_space() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmPeak:")).unwrap();
    1024 * line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap()
}

/// Runs `test` and holds it to 512 MB more address space: files here have at most a megabyte, lies
/// mostly billions, and a thread's own arena takes 128 MB.
fn within_memory(test: impl FnOnce()) {
    #[cfg(target_os = "linux")]
    let before = peak_address_space();
    test();
    #[cfg(target_os = "linux")]
    assert!(peak_address_space() - before < 512 << 20, "grew from {before} bytes");
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

#[test]
fn mutated_small_files_are_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("small.safetensors");
    within_memory(|| {
        proptest!(cases(3000), |(file in small_file(), changes in prop::collection::vec(mutation(), 0..3))| {
            let mut bytes = file;
            for change in changes {
                bytes = change.apply(bytes);
                // A second change is made to a file that can still be taken apart.
                if SafeTensors::deserialize(&bytes).is_err() {
                    break;
                }
            }
            open_and_compare(&path, &bytes)?;
        });
    });
}

#[test]
fn mutated_checkpoints_are_read_or_refused() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    let originals: Vec<Vec<u8>> = golden_files().iter().map(|path| std::fs::read(path).unwrap()).collect();
    for original in &originals {
        open_and_compare(&path, original).unwrap();
        Checkpoint::open_safetensors(&[&path]).unwrap();
    }
    within_memory(|| {
        proptest!(cases(600), |(at in any::<Index>(), change in mutation())| {
            open_and_compare(&path, &change.apply(at.get(&originals).clone()))?;
        });
    });
}

#[test]
fn noise_is_no_file() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("noise.safetensors");
    within_memory(|| {
        proptest!(cases(500), |(bytes in prop::collection::vec(any::<u8>(), 0..200))| {
            open_and_compare(&path, &bytes)?;
        });
    });
}

#[test]
fn shards_that_share_a_tensor_are_refused_by_its_name() {
    let shards: Vec<PathBuf> = golden_files()
        .into_iter()
        .filter(|path| path.to_string_lossy().contains("float16_sharded"))
        .collect();
    assert_eq!(shards.len(), 5);
    let folder = TempDir::new().unwrap();
    Checkpoint::open_safetensors(&shards).unwrap();
    for shard in &shards {
        let copy = folder.path().join(shard.file_name().unwrap());
        std::fs::copy(shard, &copy).unwrap();
        for again in [shard, &copy] {
            let mut paths = shards.clone();
            paths.push(again.clone());
            match Checkpoint::open_safetensors(&paths) {
                Err(Error::DuplicateTensor { name, path }) => {
                    assert_eq!(&path, again);
                    assert!(Checkpoint::open_safetensors(&[shard]).unwrap().contains(&name), "{name}");
                }
                other => panic!("{other:?}"),
            }
        }
    }
}

/// Headers with one lie each, and words that the message must contain.
#[test]
fn each_lie_is_named() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    let entry = |name: &str, shape: &str, begin: u64, end: u64| {
        format!(r#""{name}":{{"dtype":"F32","shape":{shape},"data_offsets":[{begin},{end}]}}"#)
    };
    let many_dims = format!("[{}4]", "1,".repeat(16));
    let lies: Vec<(String, usize, &[&str])> = vec![
        (
            r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,12]}}"#.into(),
            12,
            &["tensor w", "[4]", "16", "12"],
        ),
        (r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#.into(), 12, &["16", "12"]),
        (r#"{"w":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}}"#.into(), 20, &["16", "20"]),
        (r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#.into(), 8, &["tensor w", "4 to 8"]),
        (r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#.into(), 4, &["tensor w", "4 to 0"]),
        (
            format!("{{{},{}}}", entry("a", "[2]", 0, 8), entry("b", "[2]", 4, 12)),
            12,
            &["tensor b", "4 to 12", "at 8"],
        ),
        (
            r#"{"w":{"dtype":"F32","shape":[4294967296,4294967296,16],"data_offsets":[0,0]}}"#.into(),
            0,
            &["tensor w", "4294967296", "too large"],
        ),
        (r#"{"w":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#.into(), 1, &["tensor w", "F4", "[3]"]),
        (r#"{"w":{"dtype":"F99","shape":[1],"data_offsets":[0,4]}}"#.into(), 4, &["tensor w", "F99", "F32"]),
        (r#"{"w":{"dtype":"F32","shape":["1"],"data_offsets":[0,4]}}"#.into(), 4, &["tensor w", "string"]),
        (r#"{"w":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#.into(), 4, &["tensor w", "-1"]),
        (r#"{"w":{"dtype":"F32","shape":[1]}}"#.into(), 4, &["tensor w", "data_offsets"]),
        (r#"{"w":{"dtype":"F32","shape":[1],"data_offsets":[0,4,8]}}"#.into(), 4, &["tensor w"]),
        (format!("{{{}}}", entry("w", &many_dims, 0, 16)), 16, &["tensor w", "16 dimensions"]),
        (format!("{{{0},{0}}}", entry("w", "[1]", 0, 4)), 4, &["tensor w", "twice"]),
        (format!(r#"{{"{}":null}}"#, "n".repeat(300)), 0, &["name has 300 bytes"]),
        (r#"["w"]"#.into(), 0, &["an object of tensors"]),
        (r#"{"w":"#.into(), 0, &["header"]),
        ("".into(), 0, &["header"]),
    ];
    for (header, data, words) in lies {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(vec![0; data]);
        std::fs::write(&path, bytes).unwrap();
        let message = Checkpoint::open_safetensors(&[&path]).unwrap_err().to_string();
        for word in words {
            assert!(message.contains(word), "{header}: {message:?} lacks {word:?}");
        }
    }
    for (length, word) in [(u64::MAX, "allowed"), (100_000_001, "allowed"), (1000, "cut short")] {
        let mut bytes = length.to_le_bytes().to_vec();
        bytes.extend(b"{}");
        std::fs::write(&path, bytes).unwrap();
        let message = Checkpoint::open_safetensors(&[&path]).unwrap_err().to_string();
        assert!(message.contains(word) && message.contains(&length.to_string()[..3]), "{message}");
    }
    for length in 0..8 {
        std::fs::write(&path, vec![0; length]).unwrap();
        let message = Checkpoint::open_safetensors(&[&path]).unwrap_err().to_string();
        assert!(message.contains(&format!("the file has {length}")), "{message}");
    }
}
