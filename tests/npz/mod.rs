//! NumPy's archives, as far as the reference cases use them.

use std::fs::File;
use std::io::Read;
use std::path::Path;

/// An array of an `.npz` file, C-contiguous.
pub struct Array<T> {
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its elements, row-major.
    pub values: Vec<T>,
}

impl<T: bytemuck::AnyBitPattern> Array<T> {
    /// Reads one array. NumPy's format 1.0 (numpy.lib.format): magic, version, the header's length and the header, a
    /// Python dictionary that says type, order and shape; then the elements.
    pub fn read(npz: &Path, name: &str, descr: &str) -> Array<T> {
        let mut archive = zip::ZipArchive::new(File::open(npz).unwrap()).unwrap();
        let mut bytes = Vec::new();
        archive.by_name(&format!("{name}.npy")).unwrap().read_to_end(&mut bytes).unwrap();
        assert_eq!(bytes[..8], *b"\x93NUMPY\x01\x00", "{name} in {}", npz.display());
        let header_len = usize::from(u16::from_le_bytes([bytes[8], bytes[9]]));
        let (header, elements) = bytes[10..].split_at(header_len);
        let header = str::from_utf8(header).unwrap();
        assert!(header.contains(&format!("'descr': '{descr}'")), "{name}: {header}");
        assert!(header.contains("'fortran_order': False"), "{name}: {header}");
        let shape = header.split_once("'shape': (").unwrap().1.split_once(')').unwrap().0;
        let shape: Vec<usize> =
            shape.split(',').map(str::trim).filter(|n| !n.is_empty()).map(|n| n.parse().unwrap()).collect();
        let values: Vec<T> =
            elements.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect();
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
        Array { shape, values }
    }

    /// The values of sequence `i`, dimension 0.
    pub fn of_sequence(&self, i: usize) -> &[T] {
        let len = self.values.len() / self.shape[0];
        &self.values[i * len..(i + 1) * len]
    }
}
