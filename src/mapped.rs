//! Memory for what is streamed: lines of a cache, and packed weights on huge pages, in memory or of a file.

use memmap2::{Mmap, MmapMut, MmapOptions};
use std::fs::File;
use std::ops::Range;
use std::sync::Arc;

/// A line of a cache: memory that is moved, aligned and given out as one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
pub struct Line([u8; 64]);

// SAFETY: any bits are a line, all zeros too, and it has no padding.
unsafe impl bytemuck::Zeroable for Line {}
// SAFETY: as above; it has no interior mutability and no pointers.
unsafe impl bytemuck::Pod for Line {}

/// Memory on huge pages where the system gives them: zeroed and to be filled, or a file's.
pub struct Arena {
    map: Map,
    start: usize,
    len: usize,
}

enum Map {
    Own(MmapMut),
    File(Mmap),
}

/// The size of a huge page on x86-64, and of most on aarch64.
const HUGE_PAGE: usize = 2 << 20;

impl Arena {
    /// `len` zeroed bytes; pages are taken from the system as they are first written.
    ///
    /// # Errors
    /// What the operating system says, such as out of memory.
    pub fn new(len: usize) -> std::io::Result<Arena> {
        let total = len.checked_add(HUGE_PAGE).ok_or(std::io::ErrorKind::OutOfMemory)?;
        let map = MmapMut::map_anon(total)?;
        let start = map.as_ptr().align_offset(HUGE_PAGE);
        // Fewer pages mean fewer address translations; refused requests change nothing but speed.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Ok(Arena { map: Map::Own(map), start, len })
    }

    /// The first `len` bytes of a regular file that has as many, if mapping them puts them on huge pages; None where it
    /// doesn't, or where a system does not tell.
    ///
    /// The file must stay as it is while it is mapped. Where somebody cuts it short the process is ended by SIGBUS, as
    /// with any program that maps files; where somebody writes into it, the weights change.
    pub fn of_file(file: &File, len: usize) -> Option<Arena> {
        if len < HUGE_PAGE {
            return None;
        }
        // SAFETY: Rust wants bytes behind a `&[u8]` not to change, which no process can promise of a file. Nothing here
        // or in the kernels depends on it: the bytes are only ever loaded as numbers, of which every one is valid, never
        // as lengths, offsets or anything that is looked at twice. Files of this crate are replaced, never written into.
        let map = unsafe { MmapOptions::new().len(len).map(file) }.ok()?;
        // Before the first page is there: it decides about the pages that a file system reads into.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        for page in map.chunks(HUGE_PAGE) {
            std::hint::black_box(page[0]);
        }
        // The end of a file fills no page.
        (huge_bytes(&map) >= len / 4 * 3).then_some(Arena { map: Map::File(map), start: 0, len })
    }

    /// The bytes, to be filled.
    ///
    /// # Panics
    /// When they are a file's.
    pub fn bytes_mut(&mut self) -> &mut [u8] {
        match &mut self.map {
            Map::Own(map) => &mut map[self.start..self.start + self.len],
            Map::File(_) => panic!("a mapped file is not written to"),
        }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        let map: &[u8] = match &self.map {
            Map::Own(map) => map,
            Map::File(map) => map,
        };
        &map[self.start..self.start + self.len]
    }

    /// Ends the filling: from here on the bytes are shared and constant.
    pub fn freeze(self) -> Arc<Arena> {
        Arc::new(self)
    }
}

/// How many of these bytes are mapped by huge pages, by `PAGEMAP_SCAN` of Linux 6.7 and later; 0 where it is not there.
#[cfg(target_os = "linux")]
fn huge_bytes(map: &[u8]) -> usize {
    /// `struct page_region` of linux/fs.h.
    #[derive(Clone, Copy, Default)]
    #[repr(C)]
    struct Region {
        start: u64,
        end: u64,
        categories: u64,
    }
    /// `struct pm_scan_arg` of linux/fs.h.
    #[derive(Default)]
    #[repr(C)]
    struct Scan {
        size: u64,
        flags: u64,
        start: u64,
        end: u64,
        walk_end: u64,
        regions: u64,
        regions_len: u64,
        max_pages: u64,
        category_inverted: u64,
        category_mask: u64,
        category_anyof_mask: u64,
        return_mask: u64,
    }
    const PAGE_IS_HUGE: u64 = 1 << 6;
    // _IOWR('f', 16, struct pm_scan_arg)
    const PAGEMAP_SCAN: u32 = 3 << 30 | (size_of::<Scan>() as u32) << 16 | (b'f' as u32) << 8 | 16;

    let Ok(pagemap) = File::open("/proc/self/pagemap") else { return 0 };
    // Neighbours are one region, so that a file in one piece takes one; further pieces are not counted.
    let mut regions = [Region::default(); 64];
    let start = map.as_ptr() as u64;
    let mut scan = Scan {
        size: size_of::<Scan>() as u64,
        start,
        end: (start + map.len() as u64).next_multiple_of(4096),
        regions: regions.as_mut_ptr() as u64,
        regions_len: regions.len() as u64,
        category_mask: PAGE_IS_HUGE,
        return_mask: PAGE_IS_HUGE,
        ..Scan::default()
    };
    // SAFETY: the request reads and writes one `Scan`, which is of the size that its number says, and writes at most
    // `regions_len` regions; both outlive the call. A kernel without it refuses the number.
    let found =
        unsafe { libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&pagemap), PAGEMAP_SCAN as _, &raw mut scan) };
    let found = usize::try_from(found).unwrap_or(0).min(regions.len());
    regions[..found].iter().map(|region| (region.end - region.start) as usize).sum()
}

#[cfg(not(target_os = "linux"))]
fn huge_bytes(_map: &[u8]) -> usize {
    0
}

/// A constant piece of an [`Arena`].
#[derive(Clone)]
pub struct Slab {
    arena: Arc<Arena>,
    range: Range<usize>,
}

impl Slab {
    /// Bytes `range` of the arena.
    ///
    /// # Panics
    /// When the range lies outside of it.
    pub fn new(arena: &Arc<Arena>, range: Range<usize>) -> Slab {
        assert!(range.start <= range.end && range.end <= arena.len);
        Slab { arena: Arc::clone(arena), range }
    }

    /// The bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.arena.bytes()[self.range.clone()]
    }
}
