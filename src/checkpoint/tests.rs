use super::*;
use half::bf16;
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors, serialize_to_file, tensor::TensorView};
use std::path::PathBuf;
use tempfile::TempDir;

fn golden(case: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/cases").join(case)
}

fn safetensors_files(folder: &Path) -> Vec<PathBuf> {
    let mut paths: Vec<PathBuf> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|ext| ext == "safetensors"))
        .collect();
    paths.sort();
    paths
}

/// The elements of a view, converted one by one.
fn converted(dtype: Dtype, bytes: &[u8]) -> Vec<f32> {
    let two = |b: &[u8]| u16::from_le_bytes(b.try_into().unwrap());
    match dtype {
        Dtype::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes(b.try_into().unwrap())).collect(),
        Dtype::F64 => {
            bytes.chunks_exact(8).map(|b| f64::from_le_bytes(b.try_into().unwrap()) as f32).collect()
        }
        Dtype::F16 => bytes.chunks_exact(2).map(|b| f16::from_bits(two(b)).to_f32()).collect(),
        Dtype::BF16 => bytes.chunks_exact(2).map(|b| bf16::from_bits(two(b)).to_f32()).collect(),
        other => panic!("no weights are stored as {other}"),
    }
}

fn read_all(tensor: &Tensor) -> Vec<f32> {
    let mut values = vec![f32::NAN; tensor.rows() * tensor.row_len()];
    tensor.read_rows(0..tensor.rows(), &mut values).unwrap();
    values
}

/// Writes `values` as `dtype`, behind `before` bytes of something else.
fn raw_file(folder: &TempDir, dtype: StoredType, values: &[f64], before: usize) -> PathBuf {
    let mut bytes = vec![0xA5; before];
    for &value in values {
        match dtype {
            StoredType::F32 => bytes.extend((value as f32).to_le_bytes()),
            StoredType::F16 => bytes.extend(f16::from_f64(value).to_le_bytes()),
            StoredType::BF16 => bytes.extend(bf16::from_f64(value).to_le_bytes()),
            StoredType::F64 => bytes.extend(value.to_le_bytes()),
        }
    }
    let path = folder.path().join("raw.bin");
    std::fs::write(&path, bytes).unwrap();
    path
}

fn message(result: Result<impl std::fmt::Debug>) -> String {
    result.unwrap_err().to_string()
}

#[test]
fn golden_checkpoints_read_as_the_safetensors_crate_reads_them() {
    for (case, dtype) in [
        ("float16_sharded", StoredType::F16),
        ("bfloat16", StoredType::BF16),
        ("odd_shapes", StoredType::F32),
    ] {
        let paths = safetensors_files(&golden(case));
        let checkpoint = Checkpoint::open_safetensors(&paths).unwrap();
        let mut seen = 0;
        for path in &paths {
            let bytes = std::fs::read(path).unwrap();
            for (name, view) in SafeTensors::deserialize(&bytes).unwrap().iter() {
                let tensor = checkpoint.get(name).unwrap();
                assert_eq!(tensor.stored_shape(), view.shape(), "{case} {name}");
                assert_eq!(tensor.shape(), view.shape(), "{case} {name}");
                assert_eq!((tensor.dtype(), tensor.transposed()), (dtype, false), "{case} {name}");
                let expected = converted(view.dtype(), view.data());
                assert!(expected.iter().any(|&x| x != 0.0), "{case} {name} is empty");
                assert_eq!(read_all(tensor), expected, "{case} {name}");
                seen += 1;
            }
        }
        assert_eq!(checkpoint.names().count(), seen);
    }
}

#[test]
fn every_type_reads_in_pieces_larger_than_the_scratch() {
    let folder = TempDir::new().unwrap();
    let (rows, row_len) = (301, 1000);
    let values: Vec<f64> = (0..rows * row_len).map(|i| (i as f64 * 0.37).sin() / 3.0).collect();
    for dtype in [StoredType::F32, StoredType::F16, StoredType::BF16, StoredType::F64] {
        let path = raw_file(&folder, dtype, &values, 13);
        let mut checkpoint = Checkpoint::new();
        checkpoint.add_file("w", &path, 13, dtype, &[rows, row_len], false).unwrap();
        let expected: Vec<f32> = values
            .iter()
            .map(|&x| match dtype {
                StoredType::F16 => f16::from_f64(x).to_f32(),
                StoredType::BF16 => bf16::from_f64(x).to_f32(),
                StoredType::F32 | StoredType::F64 => x as f32,
            })
            .collect();
        let tensor = checkpoint.get("w").unwrap();
        assert_eq!(tensor.dtype(), dtype);
        assert_eq!(read_all(tensor), expected, "{dtype:?}");
        let mut some = vec![0.0; 200 * row_len];
        tensor.read_rows(7..207, &mut some).unwrap();
        assert_eq!(some, expected[7 * row_len..207 * row_len], "{dtype:?}");
    }
}

#[test]
fn threads_read_one_tensor_at_once() {
    let folder = TempDir::new().unwrap();
    let values: Vec<f64> = (0..64 * 100).map(f64::from).collect();
    let path = raw_file(&folder, StoredType::BF16, &values, 0);
    let mut checkpoint = Checkpoint::new();
    checkpoint.add_file("w", &path, 0, StoredType::BF16, &[64, 100], false).unwrap();
    let tensor = checkpoint.get("w").unwrap();
    let whole = read_all(tensor);
    let mut pieces = vec![0.0; whole.len()];
    std::thread::scope(|scope| {
        for (i, piece) in pieces.chunks_mut(800).enumerate() {
            scope.spawn(move || tensor.read_rows(8 * i..8 * i + 8, piece).unwrap());
        }
    });
    assert_eq!(pieces, whole);
}

#[test]
fn parts_append_along_the_stored_rows() {
    let folder = TempDir::new().unwrap();
    let path = raw_file(&folder, StoredType::F16, &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 2);
    let mut checkpoint = Checkpoint::new();
    checkpoint.add_file("c_attn", &path, 2, StoredType::F16, &[2, 3], true).unwrap();
    checkpoint.add_array("c_attn", vec![7.0, 8.0, 9.0], &[1, 3], true).unwrap();
    checkpoint.add_array("c_attn", vec![], &[0, 3], true).unwrap();
    checkpoint.add_file("c_attn", &path, 2, StoredType::F16, &[1, 3], true).unwrap();
    let tensor = checkpoint.get("c_attn").unwrap();
    assert_eq!((tensor.stored_shape(), tensor.shape()), (&[4, 3][..], vec![3, 4]));
    assert_eq!(checkpoint.shape("c_attn").unwrap(), [3, 4]);
    assert_eq!(read_all(tensor), [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 1.0, 2.0, 3.0]);
    let mut middle = [0.0; 6];
    tensor.read_rows(1..3, &mut middle).unwrap();
    assert_eq!(middle, [4.0, 5.0, 6.0, 7.0, 8.0, 9.0]);
    tensor.read_rows(4..4, &mut []).unwrap();

    let mut biases = Checkpoint::new();
    for value in [1.0, 2.0, 3.0] {
        biases.add_array("b", vec![value; 2], &[2], false).unwrap();
    }
    let bias = biases.get("b").unwrap();
    assert_eq!((bias.rows(), bias.row_len()), (6, 1));
    assert_eq!(read_all(bias), [1.0, 1.0, 2.0, 2.0, 3.0, 3.0]);
}

#[test]
fn what_does_not_fit_is_not_appended() {
    let mut checkpoint = Checkpoint::new();
    checkpoint.add_array("w", vec![0.0; 6], &[2, 3], false).unwrap();
    checkpoint.add_array("x", vec![1.0], &[], false).unwrap();
    for (name, len, shape, transposed) in [
        ("w", 4, &[1, 4][..], false),
        ("w", 3, &[3], false),
        ("w", 3, &[1, 3, 1], false),
        ("w", 3, &[1, 3], true),
        ("x", 1, &[], false),
        ("x", 1, &[1], false),
    ] {
        let error = checkpoint.add_array(name, vec![0.0; len], shape, transposed).unwrap_err();
        assert!(matches!(&error, Error::AppendMismatch { name: n, .. } if n == name), "{error}");
    }
    assert_eq!(read_all(checkpoint.get("w").unwrap()), [0.0; 6]);
    assert_eq!(read_all(checkpoint.get("x").unwrap()), [1.0]);
}

#[test]
fn arrays_and_flags_are_held_to_their_shapes() {
    let mut checkpoint = Checkpoint::new();
    let error = checkpoint.add_array("w", vec![0.0; 5], &[2, 3], false).unwrap_err();
    assert_eq!(error.to_string(), "tensor w: shape [2, 3] takes 6 elements, found 5");
    for shape in [&[4][..], &[2, 1, 2], &[]] {
        let values = vec![0.0; shape.iter().product()];
        let error = checkpoint.add_array("w", values, shape, true).unwrap_err();
        assert!(matches!(error, Error::TransposedShape { .. }), "{error}");
    }
    for shape in [&[usize::MAX, 2][..], &[0, usize::MAX, usize::MAX], &[1 << 62]] {
        let error = checkpoint.add_array("w", vec![], shape, false).unwrap_err();
        assert!(matches!(error, Error::TensorTooLarge { .. }), "{error}");
    }
    // Each part is small, their sum is not: rows of length 0 take no bytes but still count.
    checkpoint.add_array("rows", vec![], &[1 << 59, 0], false).unwrap();
    let error = checkpoint.add_array("rows", vec![], &[1 << 60, 0], false).unwrap_err();
    assert!(matches!(error, Error::TensorTooLarge { .. }), "{error}");
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["rows"]);
    assert!(checkpoint.remove("rows") && !checkpoint.remove("rows"));
    assert!(matches!(checkpoint.get("rows"), Err(Error::MissingTensor { .. })));
}

#[test]
fn a_place_outside_the_file_is_refused() {
    let folder = TempDir::new().unwrap();
    let path = raw_file(&folder, StoredType::F32, &[0.0; 10], 0);
    let mut checkpoint = Checkpoint::new();
    for (offset, shape) in [(0, 11), (4, 10), (41, 1), (u64::MAX, 1), (u64::MAX - 3, 1)] {
        let error = checkpoint.add_file("w", &path, offset, StoredType::F32, &[shape], false).unwrap_err();
        assert!(matches!(error, Error::TensorOutsideFile { file_bytes: 40, .. }), "{error}");
    }
    checkpoint.add_file("w", &path, 36, StoredType::F32, &[1], false).unwrap();
    checkpoint.add_file("none", &path, 40, StoredType::F32, &[0, 7], false).unwrap();
    assert!(read_all(checkpoint.get("none").unwrap()).is_empty());
}

#[test]
fn a_file_that_shrinks_is_an_error_when_it_is_read() {
    let folder = TempDir::new().unwrap();
    for dtype in [StoredType::F32, StoredType::BF16] {
        let path = raw_file(&folder, dtype, &[1.0; 100], 0);
        let mut checkpoint = Checkpoint::new();
        checkpoint.add_file("w", &path, 0, dtype, &[100], false).unwrap();
        std::fs::File::options().write(true).open(&path).unwrap().set_len(50).unwrap();
        let result = checkpoint.get("w").unwrap().read_rows(0..100, &mut [0.0; 100]);
        let text = message(result);
        assert!(text.contains("raw.bin") && text.contains("shorter"), "{text}");
    }
}

#[test]
fn what_is_no_file_is_refused_at_once() {
    let folder = TempDir::new().unwrap();
    let missing = folder.path().join("missing.safetensors");
    let error = Checkpoint::open_safetensors(&[&missing]).unwrap_err();
    assert!(
        matches!(&error, Error::Io { path, source }
            if *path == missing && source.kind() == std::io::ErrorKind::NotFound),
        "{error}"
    );
    let error = Checkpoint::open_safetensors(&[folder.path()]).unwrap_err();
    assert!(matches!(error, Error::NotAFile { .. }), "{error}");
}

#[cfg(unix)]
#[test]
fn a_device_is_not_read_for_ever() {
    let text = message(Checkpoint::open_safetensors(&["/dev/zero"]));
    assert_eq!(text, "/dev/zero: not a regular file");
}

#[test]
fn a_type_without_weights_is_an_error_only_for_who_asks() {
    let folder = TempDir::new().unwrap();
    let path = folder.path().join("model.safetensors");
    let (mask, weight) = ([1; 16], 1.5f32.to_le_bytes());
    let tensors = [
        ("h.0.attn.bias", TensorView::new(Dtype::BOOL, vec![1, 1, 4, 4], &mask).unwrap()),
        ("steps", TensorView::new(Dtype::I64, vec![2], &mask).unwrap()),
        ("w", TensorView::new(Dtype::F32, vec![], &weight).unwrap()),
    ];
    serialize_to_file(tensors, None, &path).unwrap();
    let mut checkpoint = Checkpoint::open_safetensors(&[&path]).unwrap();
    assert_eq!(checkpoint.names().collect::<Vec<_>>(), ["h.0.attn.bias", "steps", "w"]);
    assert_eq!(checkpoint.shape("h.0.attn.bias").unwrap(), [1, 1, 4, 4]);
    assert_eq!(read_all(checkpoint.get("w").unwrap()), [1.5]);
    let text = message(checkpoint.get("h.0.attn.bias"));
    assert!(text.contains("h.0.attn.bias") && text.contains("BOOL"), "{text}");
    let error = checkpoint.add_array("steps", vec![0.0; 2], &[2], false).unwrap_err();
    assert!(matches!(error, Error::AppendMismatch { .. }), "{error}");
    assert!(checkpoint.remove("h.0.attn.bias") && !checkpoint.contains("h.0.attn.bias"));
}

#[test]
fn stored_types_go_by_their_names() {
    for dtype in [StoredType::F32, StoredType::F16, StoredType::BF16, StoredType::F64] {
        assert_eq!(StoredType::from_name(dtype.name()).unwrap(), dtype);
    }
    let text = message(StoredType::from_name("int8"));
    assert!(text.contains("\"int8\"") && text.contains("bfloat16"), "{text}");
}

proptest! {
    #[test]
    fn rows_of_parts_are_those_of_the_whole(
        parts in prop::collection::vec(0usize..5, 1..6),
        row_len in 0usize..7,
        ends in any::<(prop::sample::Index, prop::sample::Index)>(),
    ) {
        let rows: usize = parts.iter().sum();
        let whole: Vec<f32> = (0..rows * row_len).map(|i| i as f32).collect();
        let mut checkpoint = Checkpoint::new();
        let mut start = 0;
        for part in parts {
            let values = whole[start * row_len..(start + part) * row_len].to_vec();
            checkpoint.add_array("w", values, &[part, row_len], false).unwrap();
            start += part;
        }
        let (a, b) = (ends.0.index(rows + 1), ends.1.index(rows + 1));
        let range = a.min(b)..a.max(b);
        let mut out = vec![f32::NAN; range.len() * row_len];
        checkpoint.get("w").unwrap().read_rows(range.clone(), &mut out).unwrap();
        prop_assert_eq!(&out, &whole[range.start * row_len..range.end * row_len]);
    }

    #[test]
    fn a_place_is_taken_when_it_is_inside_and_refused_when_not(
        offset in prop_oneof![0u64..60, any::<u64>()],
        shape in prop::collection::vec(prop_oneof![0usize..5, any::<usize>()], 0..4),
    ) {
        let folder = TempDir::new().unwrap();
        let path = raw_file(&folder, StoredType::BF16, &[1.0; 20], 0);
        let mut checkpoint = Checkpoint::new();
        let taken = checkpoint.add_file("w", &path, offset, StoredType::BF16, &shape, false);
        let elements = shape.iter().map(|&dim| dim as u128).fold(1, u128::saturating_mul);
        let inside = u128::from(offset) + 2 * elements.min(1 << 100) <= 40;
        prop_assert!(taken.is_ok() <= inside, "{shape:?} at {offset}");
        if taken.is_ok() {
            // 1.0 is 0x3f80; from an odd byte on the two halves of neighbours are read.
            let expected = if offset % 2 == 0 { 1.0 } else { f32::from_bits(0x803f_0000) };
            let values = read_all(checkpoint.get("w").unwrap());
            prop_assert!(values.iter().all(|&x| x == expected), "{shape:?} at {offset}: {values:?}");
        } else if inside {
            let too_large = matches!(taken, Err(Error::TensorTooLarge { .. }));
            prop_assert!(too_large && shape.contains(&0), "{shape:?} at {offset}");
        }
    }
}
