//! The buddy allocator of allocator.py, compiled: the same answers, block for block, behind a C interface.
//!
//! Free runs of 2^k blocks are kept in one doubly linked list for each k, newest last, whose links are arrays indexed by
//! the run's first block. So a run is found, taken out or put in without searching, and nothing is allocated while serving.

const NONE: u32 = u32::MAX;
const USED: u8 = u8::MAX;

#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(C)]
pub struct Run {
    start: u32,
    length: u32,
}

#[repr(C)]
pub struct Want {
    count: u32,
    after: i64,
}

pub struct Buddy {
    num_blocks: u32,
    headroom: u32,
    orders: usize,
    num_free: u32,
    order_of: Vec<u8>, // of the free run that begins at a block; USED where none does
    previous: Vec<u32>,
    next: Vec<u32>,
    newest: Vec<u32>, // for each order
    found: Vec<Run>,
    sorted: Vec<Run>,
}

impl Buddy {
    fn new(num_blocks: u32, headroom: u32) -> Self {
        let orders = (32 - num_blocks.leading_zeros()) as usize;
        let n = num_blocks as usize;
        let mut made = Buddy {
            num_blocks,
            headroom,
            orders,
            num_free: 0,
            order_of: vec![USED; n],
            previous: vec![NONE; n],
            next: vec![NONE; n],
            newest: vec![NONE; orders],
            found: Vec::new(),
            sorted: Vec::new(),
        };
        made.put(0, num_blocks);
        made
    }

    fn is_free(&self, start: u32, order: usize) -> bool {
        (start as usize) < self.order_of.len() && self.order_of[start as usize] == order as u8
    }

    fn link(&mut self, start: u32, order: usize) {
        let last = self.newest[order];
        self.previous[start as usize] = last;
        self.next[start as usize] = NONE;
        if last != NONE {
            self.next[last as usize] = start;
        }
        self.newest[order] = start;
        self.order_of[start as usize] = order as u8;
    }

    fn unlink(&mut self, start: u32, order: usize) {
        let (before, after) = (self.previous[start as usize], self.next[start as usize]);
        if before != NONE {
            self.next[before as usize] = after;
        }
        if after != NONE {
            self.previous[after as usize] = before;
        } else {
            self.newest[order] = before;
        }
        self.order_of[start as usize] = USED;
    }

    /// Free an interval: its aligned pieces, each merged with its buddy as long as that is free too.
    fn put(&mut self, mut start: u32, mut left: u32) {
        self.num_free += left;
        while left > 0 {
            let largest = (31 - left.leading_zeros()) as usize;
            let aligned = if start > 0 { start.trailing_zeros() as usize } else { self.orders - 1 };
            let order = largest.min(aligned);
            self.merge(start, order);
            start += 1 << order;
            left -= 1 << order;
        }
    }

    fn merge(&mut self, mut start: u32, mut order: usize) {
        while order + 1 < self.orders {
            let buddy = start ^ (1 << order);
            if !self.is_free(buddy, order) {
                break;
            }
            self.unlink(buddy, order);
            start = start.min(buddy);
            order += 1;
        }
        self.link(start, order);
    }

    /// The largest aligned piece of at most `most` blocks that begins at `block`, if `block` is free.
    fn take_at(&mut self, block: u32, most: u32) -> Option<Run> {
        for order in 0..self.orders {
            let start = block & !((1u32 << order) - 1);
            if !self.is_free(start, order) {
                continue;
            }
            self.unlink(start, order);
            let aligned = if block > 0 { block.trailing_zeros() as usize } else { order };
            let size = 1u32 << order.min(aligned).min((31 - most.leading_zeros()) as usize);
            self.num_free -= 1 << order;
            self.put(start, block - start);
            self.put(block + size, start + (1 << order) - block - size);
            return Some(Run { start: block, length: size });
        }
        None
    }

    /// The first piece of the smallest free run of at least `goal` blocks; else of the largest that there is.
    fn take_best(&mut self, most: u32, goal: u32) -> Run {
        let least = (self.orders - 1).min((32 - (goal - 1).leading_zeros()) as usize);
        let order = (least..self.orders)
            .find(|&o| self.newest[o] != NONE)
            .or_else(|| (0..least).rev().find(|&o| self.newest[o] != NONE))
            .expect("enough blocks are free");
        self.take_at(self.newest[order], most).expect("a free run begins here")
    }

    fn append(&mut self, first: usize, run: Run) {
        if self.found.len() > first {
            let last = self.found.last_mut().expect("not empty");
            if last.start + last.length == run.start {
                last.length += run.length;
                return;
            }
        }
        self.found.push(run);
    }

    fn serve(&mut self, want: &Want) {
        let first = self.found.len();
        let (mut left, mut after) = (want.count, want.after);
        while left > 0 && after >= 0 {
            let Some(run) = self.take_at(after as u32 + 1, left) else { break };
            self.append(first, run);
            left -= run.length;
            after = i64::from(run.start + run.length) - 1;
        }
        let goal = if want.after < 0 { self.headroom } else { 1 };
        while left > 0 {
            let mut run = self.take_best(left, left.max(goal));
            self.append(first, run);
            left -= run.length;
            while left > 0 {
                let Some(more) = self.take_at(run.start + run.length, left) else { break };
                self.append(first, more);
                left -= more.length;
                run = more;
            }
        }
    }

    /// Index in the sorted list of the first run that cannot be released.
    fn refuse(&mut self, release: &[Run]) -> Option<Run> {
        self.sorted.clear();
        self.sorted.extend_from_slice(release);
        self.sorted.sort_unstable();
        for (i, run) in self.sorted.iter().enumerate() {
            let end = u64::from(run.start) + u64::from(run.length);
            let limit = self.sorted.get(i + 1).map_or(self.num_blocks, |r| r.start);
            if run.length < 1 || end > u64::from(self.num_blocks) || end > u64::from(limit) || self.any_free(*run) {
                return Some(*run);
            }
        }
        None
    }

    fn any_free(&self, run: Run) -> bool {
        let end = run.start + run.length;
        (0..self.orders).any(|o| self.is_free(run.start & !((1u32 << o) - 1), o))
            || (run.start..end).any(|b| self.order_of[b as usize] != USED)
    }
}

/// A new allocator, or null where `num_blocks` or `headroom` is zero.
#[no_mangle]
pub extern "C" fn buddy_new(num_blocks: u32, headroom: u32) -> *mut Buddy {
    if num_blocks == 0 || headroom == 0 || num_blocks >= 1 << 31 {
        return std::ptr::null_mut();
    }
    Box::into_raw(Box::new(Buddy::new(num_blocks, headroom)))
}

/// # Safety
/// `buddy` is from `buddy_new`, and is not used afterwards.
#[no_mangle]
pub unsafe extern "C" fn buddy_drop(buddy: *mut Buddy) {
    drop(Box::from_raw(buddy));
}

/// # Safety
/// `buddy` is from `buddy_new`.
#[no_mangle]
pub unsafe extern "C" fn buddy_num_free(buddy: *const Buddy) -> u32 {
    (*buddy).num_free
}

/// # Safety
/// `buddy` is from `buddy_new`.
#[no_mangle]
pub unsafe extern "C" fn buddy_largest(buddy: *const Buddy) -> u32 {
    let buddy = &*buddy;
    (0..buddy.orders).rev().find(|&o| buddy.newest[o] != NONE).map_or(0, |o| 1 << o)
}

/// Release, then serve in order. `counts[i]` becomes the number of runs of want i, or -1 where it was not served.
/// Returns the number of runs, to be read from `*runs` before the next call; -1 - i: the i-th sorted release is refused.
///
/// # Safety
/// The arrays have the lengths that are said; `buddy` is from `buddy_new`.
#[no_mangle]
pub unsafe extern "C" fn buddy_step(
    buddy: *mut Buddy,
    release: *const Run,
    num_release: usize,
    wanted: *const Want,
    num_wanted: usize,
    counts: *mut i32,
    runs: *mut *const Run,
    refused: *mut Run,
) -> i64 {
    let buddy = &mut *buddy;
    let release = if num_release == 0 { &[] } else { std::slice::from_raw_parts(release, num_release) };
    let wanted = if num_wanted == 0 { &[] } else { std::slice::from_raw_parts(wanted, num_wanted) };
    if let Some(run) = buddy.refuse(release) {
        *refused = run;
        return -1;
    }
    for run in release {
        buddy.put(run.start, run.length);
    }
    buddy.found.clear();
    for (i, want) in wanted.iter().enumerate() {
        let before = buddy.found.len();
        if want.count > buddy.num_free {
            *counts.add(i) = -1;
            continue;
        }
        buddy.serve(want);
        *counts.add(i) = (buddy.found.len() - before) as i32;
    }
    *runs = buddy.found.as_ptr();
    buddy.found.len() as i64
}
