//! Checkpoints: tensor names, and where the bytes of each tensor are.
//!
//! A [`Checkpoint`] is filled from safetensors files, from regions of any other file, or from
//! arrays in memory; nothing of the data is read until [`Tensor::read_rows`] asks for it. Reading
//! is positional and takes `&self`, so that threads can read rows of one tensor at once. Data is
//! read rather than mapped: it is only looked at once, on its way into the packed weights, and a
//! file that shrinks under a reader is then an error instead of a SIGBUS. Bytes that are packed
//! already are for [`crate::packed`].

mod data_file;
mod safetensors_header;

use crate::error::{Error, Result};
pub(crate) use data_file::DataFile;
use half::f16;
use half::slice::HalfFloatSliceExt;
use std::collections::BTreeMap;
use std::collections::btree_map::Entry as MapEntry;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

#[cfg(target_endian = "big")]
compile_error!("checkpoints hold little-endian numbers, which are read in place");

/// Bytes converted at a time: two pieces of this size stay in a core's second-level cache.
const SCRATCH_BYTES: usize = 256 << 10;

/// How a file stores the elements of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum StoredType {
    /// IEEE binary32.
    F32,
    /// IEEE binary16.
    F16,
    /// The upper half of a binary32.
    BF16,
    /// IEEE binary64, rounded to the nearest float32 when it is read.
    F64,
}

impl StoredType {
    /// The type called `float32`, `float16`, `bfloat16` or `float64`.
    ///
    /// # Errors
    /// [`Error::UnknownStoredType`] for any other name.
    pub fn from_name(name: &str) -> Result<StoredType> {
        match name {
            "float32" => Ok(StoredType::F32),
            "float16" => Ok(StoredType::F16),
            "bfloat16" => Ok(StoredType::BF16),
            "float64" => Ok(StoredType::F64),
            _ => Err(Error::UnknownStoredType { name: name.to_owned() }),
        }
    }

    /// The name that [`StoredType::from_name`] takes.
    pub fn name(self) -> &'static str {
        match self {
            StoredType::F32 => "float32",
            StoredType::F16 => "float16",
            StoredType::BF16 => "bfloat16",
            StoredType::F64 => "float64",
        }
    }

    /// Bytes of one element.
    pub fn size(self) -> usize {
        match self {
            StoredType::F16 | StoredType::BF16 => 2,
            StoredType::F32 => 4,
            StoredType::F64 => 8,
        }
    }
}

/// One tensor: its shape, and the parts that make it up along its stored dimension 0.
#[derive(Debug)]
pub struct Tensor {
    shape: Vec<usize>,
    transposed: bool,
    parts: Vec<Part>,
}

#[derive(Debug)]
struct Part {
    rows: usize,
    source: Source,
}

#[derive(Debug)]
enum Source {
    File { file: Arc<DataFile>, offset: u64, dtype: StoredType },
    Memory(Vec<f32>),
}

impl Tensor {
    /// The shape as it is stored, which [`Tensor::read_rows`] counts its rows in.
    pub fn stored_shape(&self) -> &[usize] {
        &self.shape
    }

    /// Whether the tensor is stored (out, in) where the model wants (in, out).
    pub fn transposed(&self) -> bool {
        self.transposed
    }

    /// The shape as the model means it: the stored one, reversed when it is transposed.
    pub fn shape(&self) -> Vec<usize> {
        logical(&self.shape, self.transposed)
    }

    /// Number of stored rows: stored dimension 0, or 1 for a scalar.
    pub fn rows(&self) -> usize {
        self.shape.first().copied().unwrap_or(1)
    }

    /// Elements of a stored row: 1 for a vector.
    pub fn row_len(&self) -> usize {
        self.shape.iter().skip(1).product()
    }

    /// The type that the (first part of the) tensor is stored in.
    pub fn dtype(&self) -> StoredType {
        match self.parts.first().map(|part| &part.source) {
            Some(Source::File { dtype, .. }) => *dtype,
            Some(Source::Memory(_)) | None => StoredType::F32,
        }
    }

    /// Reads stored rows `rows` as float32 into `out`, row after row.
    ///
    /// # Errors
    /// [`Error::Io`] when a file cannot be read, [`Error::FileShrank`] when it has become shorter.
    ///
    /// # Panics
    /// When `rows` ends past [`Tensor::rows`], or `out` is not `rows.len() * row_len()` long.
    pub fn read_rows(&self, rows: Range<usize>, out: &mut [f32]) -> Result<()> {
        let row_len = self.row_len();
        assert!(rows.start <= rows.end && rows.end <= self.rows(), "rows {rows:?} of {:?}", self.shape);
        assert_eq!(out.len(), rows.len() * row_len, "rows {rows:?} of {:?}", self.shape);
        let mut out = out;
        let mut first = 0;
        for part in &self.parts {
            let end = first + part.rows;
            let (from, to) = (rows.start.max(first), rows.end.min(end));
            if from < to {
                let (piece, rest) = out.split_at_mut((to - from) * row_len);
                part.read((from - first) * row_len, piece)?;
                out = rest;
            }
            first = end;
        }
        Ok(())
    }
}

impl Part {
    /// Reads the elements from `start` on into `out`.
    fn read(&self, start: usize, out: &mut [f32]) -> Result<()> {
        match &self.source {
            Source::Memory(values) => {
                out.copy_from_slice(&values[start..start + out.len()]);
                Ok(())
            }
            Source::File { file, offset, dtype } => {
                let offset = offset + (start * dtype.size()) as u64;
                match dtype {
                    StoredType::F32 => file.read_exact_at(bytemuck::cast_slice_mut(out), offset),
                    StoredType::F16 => read_converted::<f16>(file, offset, out, |stored, out| {
                        stored.convert_to_f32_slice(out);
                    }),
                    StoredType::BF16 => read_converted::<u16>(file, offset, out, |stored, out| {
                        for (out, &upper) in out.iter_mut().zip(stored) {
                            *out = f32::from_bits(u32::from(upper) << 16);
                        }
                    }),
                    StoredType::F64 => read_converted::<f64>(file, offset, out, |stored, out| {
                        for (out, &value) in out.iter_mut().zip(stored) {
                            *out = value as f32;
                        }
                    }),
                }
            }
        }
    }
}

/// Fills `out` from elements of type `T` at `offset`, a piece of at most [`SCRATCH_BYTES`] at a time.
fn read_converted<T: bytemuck::Pod>(
    file: &DataFile,
    offset: u64,
    out: &mut [f32],
    convert: impl Fn(&[T], &mut [f32]),
) -> Result<()> {
    let piece_len = (SCRATCH_BYTES / size_of::<T>()).min(out.len());
    let mut scratch = vec![T::zeroed(); piece_len];
    let mut offset = offset;
    for piece in out.chunks_mut(piece_len.max(1)) {
        let stored = &mut scratch[..piece.len()];
        file.read_exact_at(bytemuck::cast_slice_mut(stored), offset)?;
        convert(stored, piece);
        offset += size_of_val(stored) as u64;
    }
    Ok(())
}

/// What a name stands for.
#[derive(Debug)]
enum Entry {
    Tensor(Tensor),
    /// A tensor of a type that no weight has (the causal masks of old files are booleans or bytes):
    /// an error only for who asks for it.
    Unsupported {
        dtype: safetensors::Dtype,
        shape: Vec<usize>,
        file: Arc<DataFile>,
        offset: u64,
    },
}

/// Tensors by name.
#[derive(Debug, Default)]
pub struct Checkpoint {
    entries: BTreeMap<String, Entry>,
    /// One open file however many tensors it holds: file descriptors are few.
    files: BTreeMap<PathBuf, Arc<DataFile>>,
    metadata: BTreeMap<String, String>,
}

impl Checkpoint {
    /// A checkpoint without tensors.
    pub fn new() -> Checkpoint {
        Checkpoint::default()
    }

    /// Opens one safetensors file, or all the shards of one checkpoint. Headers are read and
    /// checked against the files' sizes; nothing of the data is read.
    ///
    /// # Errors
    /// [`Error::Io`] or [`Error::NotAFile`] for a path that cannot be read, a `Header...` or
    /// `Tensor...` variant for a malformed file, [`Error::DuplicateTensor`] for a name that comes
    /// twice.
    pub fn open_safetensors(paths: &[impl AsRef<Path>]) -> Result<Checkpoint> {
        let mut checkpoint = Checkpoint::new();
        for path in paths {
            let file = checkpoint.open(path.as_ref())?;
            let contents = safetensors_header::read(&file)?;
            if paths.len() == 1 {
                checkpoint.metadata = contents.metadata;
            }
            for found in contents.tensors {
                let entry = match found.stored_type() {
                    Some(dtype) => Entry::Tensor(Tensor {
                        parts: vec![Part {
                            rows: found.shape.first().copied().unwrap_or(1),
                            source: Source::File { file: Arc::clone(&file), offset: found.offset, dtype },
                        }],
                        shape: found.shape,
                        transposed: false,
                    }),
                    None => Entry::Unsupported {
                        dtype: found.dtype,
                        shape: found.shape,
                        file: Arc::clone(&file),
                        offset: found.offset,
                    },
                };
                match checkpoint.entries.entry(found.name) {
                    MapEntry::Vacant(place) => place.insert(entry),
                    MapEntry::Occupied(taken) => {
                        return Err(Error::DuplicateTensor {
                            name: taken.key().clone(),
                            path: file.path().to_owned(),
                        });
                    }
                };
            }
        }
        Ok(checkpoint)
    }

    /// Adds a tensor whose elements lie in `path`, row-major and little-endian, from byte `offset`.
    ///
    /// `shape` is the stored one; `transposed` says that it is (out, in) where the model wants
    /// (in, out). Adding to a name that is there appends along the stored dimension 0, so that
    /// separate query, key and value weights (C, C) become one (3 C, C).
    ///
    /// # Errors
    /// [`Error::TensorOutsideFile`], [`Error::TensorTooLarge`], [`Error::TransposedShape`],
    /// [`Error::AppendMismatch`], and [`Error::Io`] or [`Error::NotAFile`] for the file.
    pub fn add_file(
        &mut self,
        name: &str,
        path: &Path,
        offset: u64,
        dtype: StoredType,
        shape: &[usize],
        transposed: bool,
    ) -> Result<()> {
        let bytes = byte_count(name, shape, dtype.size())?;
        let file = self.open(path)?;
        if offset.checked_add(bytes).is_none_or(|end| end > file.len()) {
            return Err(Error::TensorOutsideFile {
                name: name.to_owned(),
                path: path.to_owned(),
                offset,
                bytes,
                file_bytes: file.len(),
            });
        }
        self.add(name, Source::File { file, offset, dtype }, shape, transposed)
    }

    /// Adds a tensor that is in memory already, row-major; otherwise like [`Checkpoint::add_file`].
    ///
    /// # Errors
    /// [`Error::ArrayLength`] when `values` does not fill `shape`, [`Error::TensorTooLarge`],
    /// [`Error::TransposedShape`], [`Error::AppendMismatch`].
    pub fn add_array(
        &mut self,
        name: &str,
        values: Vec<f32>,
        shape: &[usize],
        transposed: bool,
    ) -> Result<()> {
        let bytes = byte_count(name, shape, size_of::<f32>())?;
        if bytes != size_of_val(values.as_slice()) as u64 {
            return Err(Error::ArrayLength {
                name: name.to_owned(),
                shape: shape.to_owned(),
                found: values.len(),
            });
        }
        self.add(name, Source::Memory(values), shape, transposed)
    }

    /// The names, in ascending order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Whether there is a tensor of that name, of whatever type.
    pub fn contains(&self, name: &str) -> bool {
        self.entries.contains_key(name)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::UnsupportedStoredType`] for one that holds no weights.
    pub fn get(&self, name: &str) -> Result<&Tensor> {
        match self.entries.get(name) {
            Some(Entry::Tensor(tensor)) => Ok(tensor),
            Some(Entry::Unsupported { dtype, file, .. }) => Err(Error::UnsupportedStoredType {
                name: name.to_owned(),
                dtype: dtype.to_string(),
                path: file.path().to_owned(),
            }),
            None => Err(Error::MissingTensor { name: name.to_owned() }),
        }
    }

    /// What the writer of a single safetensors file noted in its header.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// Where a vector of bytes lies, from the start of its file.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], or [`Error::NotPacked`] for anything but a vector of U8.
    pub fn bytes(&self, name: &str) -> Result<Range<u64>> {
        let (dtype, shape) = match self.entries.get(name) {
            Some(Entry::Unsupported { dtype: safetensors::Dtype::U8, shape, offset, .. })
                if shape.len() == 1 =>
            {
                return Ok(*offset..offset + shape[0] as u64);
            }
            Some(Entry::Unsupported { dtype, shape, .. }) => (dtype.to_string(), shape.clone()),
            Some(Entry::Tensor(tensor)) => (tensor.dtype().name().to_owned(), tensor.shape.clone()),
            None => return Err(Error::MissingTensor { name: name.to_owned() }),
        };
        Err(Error::NotPacked { name: name.to_owned(), dtype, shape })
    }

    /// The file, where there is one alone.
    pub(crate) fn only_file(&self) -> Option<&DataFile> {
        self.files.values().next().filter(|_| self.files.len() == 1).map(|file| &**file)
    }

    /// The shape of a tensor of whatever type, as the model means it.
    ///
    /// # Errors
    /// [`Error::MissingTensor`].
    pub fn shape(&self, name: &str) -> Result<Vec<usize>> {
        match self.entries.get(name) {
            Some(Entry::Tensor(tensor)) => Ok(tensor.shape()),
            Some(Entry::Unsupported { shape, .. }) => Ok(shape.clone()),
            None => Err(Error::MissingTensor { name: name.to_owned() }),
        }
    }

    /// Forgets a tensor; false when there was none of that name.
    pub fn remove(&mut self, name: &str) -> bool {
        self.entries.remove(name).is_some()
    }

    fn open(&mut self, path: &Path) -> Result<Arc<DataFile>> {
        if let Some(file) = self.files.get(path) {
            return Ok(Arc::clone(file));
        }
        let file = Arc::new(DataFile::open(path)?);
        self.files.insert(path.to_owned(), Arc::clone(&file));
        Ok(file)
    }

    /// Adds or appends a part whose size has been checked.
    fn add(&mut self, name: &str, source: Source, shape: &[usize], transposed: bool) -> Result<()> {
        if transposed && shape.len() != 2 {
            return Err(Error::TransposedShape { name: name.to_owned(), shape: shape.to_owned() });
        }
        let part = Part { rows: shape.first().copied().unwrap_or(1), source };
        match self.entries.get_mut(name) {
            None => {
                let tensor = Tensor { shape: shape.to_owned(), transposed, parts: vec![part] };
                self.entries.insert(name.to_owned(), Entry::Tensor(tensor));
            }
            Some(Entry::Tensor(tensor))
                if !shape.is_empty()
                    && tensor.shape.len() == shape.len()
                    && tensor.shape[1..] == shape[1..]
                    && tensor.transposed == transposed =>
            {
                let mut whole = shape.to_owned();
                whole[0] = whole[0].saturating_add(tensor.shape[0]);
                byte_count(name, &whole, size_of::<f64>())?;
                tensor.shape = whole;
                tensor.parts.push(part);
            }
            Some(Entry::Tensor(Tensor { shape: first, .. }) | Entry::Unsupported { shape: first, .. }) => {
                return Err(Error::AppendMismatch {
                    name: name.to_owned(),
                    first: first.clone(),
                    second: shape.to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// The stored shape as the model means it.
fn logical(shape: &[usize], transposed: bool) -> Vec<usize> {
    let mut shape = shape.to_owned();
    if transposed {
        shape.reverse();
    }
    shape
}

/// Bytes of a tensor. Dimensions of 0 count as 1 for the check of its size, so that the product of
/// any of its dimensions fits too: rows are counted before it shows that they are empty.
fn byte_count(name: &str, shape: &[usize], element_size: usize) -> Result<u64> {
    let bytes = shape
        .iter()
        .try_fold(element_size, |product, &dim| product.checked_mul(dim.max(1)))
        .filter(|&bytes| bytes <= isize::MAX as usize)
        .ok_or_else(|| Error::TensorTooLarge { name: name.to_owned(), shape: shape.to_owned() })?;
    Ok(if shape.contains(&0) { 0 } else { bytes as u64 })
}

#[cfg(test)]
mod tests;
