//! The buddy allocator of allocator.py, compiled: the same answers, block for block, behind a C interface.
//!
//! Free runs of 2^k blocks are kept in one doubly linked list for each k, newest last, whose links are arrays indexed by
//! the run's first block. So a run is found, taken out or put in without searching, and nothing is allocated in a step.
//!
//! Questions and answers are rows of two 64-bit numbers in memory of the caller's: what Python computes with, so that
//! every number can be checked here before it becomes a block.

const NONE: u32 = u32::MAX;
const INSIDE: u8 = u8::MAX; // no free run begins at this block
const TOO_SMALL: i64 = i64::MIN;

/// A release is (start, length), a want (count, after), a run of the answer (start, length).
type Row = [i64; 2];

pub struct Buddy {
    num_blocks: u32,
    headroom: u32,
    orders: u32,
    num_free: u32,
    used: Vec<bool>,
    order_of: Vec<u8>, // of the free run that begins at a block
    links: Vec<[u32; 2]>, // of the free run that begins at a block: older and newer run of its order
    newest: Vec<u32>, // for each order
}

impl Buddy {
    fn new(num_blocks: u32, headroom: u32) -> Self {
        let (n, orders) = (num_blocks as usize, num_blocks.ilog2() + 1);
        let mut made = Buddy {
            num_blocks,
            headroom,
            orders,
            num_free: 0,
            used: vec![false; n],
            order_of: vec![INSIDE; n],
            links: vec![[NONE; 2]; n],
            newest: vec![NONE; orders as usize],
        };
        made.put(0, num_blocks);
        made
    }

    fn begins_free(&self, start: u32, order: u32) -> bool {
        self.order_of.get(start as usize) == Some(&(order as u8))
    }

    fn link(&mut self, start: u32, order: u32) {
        let last = std::mem::replace(&mut self.newest[order as usize], start);
        self.links[start as usize] = [last, NONE];
        if last != NONE {
            self.links[last as usize][1] = start;
        }
        self.order_of[start as usize] = order as u8;
    }

    fn unlink(&mut self, start: u32, order: u32) {
        let [older, newer] = self.links[start as usize];
        if older != NONE {
            self.links[older as usize][1] = newer;
        }
        if newer != NONE {
            self.links[newer as usize][0] = older;
        } else {
            self.newest[order as usize] = older;
        }
        self.order_of[start as usize] = INSIDE;
    }

    /// Free an interval: its aligned pieces, each merged with its buddy as long as that is free too.
    fn put(&mut self, mut start: u32, mut left: u32) {
        self.num_free += left;
        while left > 0 {
            let order = left.ilog2().min(start.trailing_zeros());
            self.merge(start, order);
            start += 1 << order;
            left -= 1 << order;
        }
    }

    fn merge(&mut self, mut start: u32, mut order: u32) {
        while order + 1 < self.orders && self.begins_free(start ^ (1 << order), order) {
            let buddy = start ^ (1 << order);
            self.unlink(buddy, order);
            start = start.min(buddy);
            order += 1;
        }
        self.link(start, order);
    }

    /// The largest aligned piece of at most `most` blocks that begins at `block`, if `block` is free: its length.
    fn take_at(&mut self, block: u32, most: u32) -> Option<u32> {
        if *self.used.get(block as usize)? {
            return None;
        }
        let mut order = (0..self.orders).find(|&k| self.begins_free(block >> k << k, k))?;
        let mut start = block >> order << order;
        self.unlink(start, order);
        let wanted = order.min(block.trailing_zeros()).min(most.ilog2());
        while order > wanted {
            // keep the half that begins with or holds `block`, and free the other
            order -= 1;
            let half = 1 << order;
            self.link(if block & half != 0 { start } else { start + half }, order);
            start += block & half;
        }
        let size = 1 << wanted;
        self.used[block as usize..(block + size) as usize].fill(true);
        self.num_free -= size;
        Some(size)
    }

    /// The first piece of the smallest free run with room for `most` and the headroom; else of the largest.
    fn take_best(&mut self, most: u32) -> (u32, u32) {
        let room = most.max(self.headroom);
        let least = (self.orders - 1).min(room.checked_next_power_of_two().map_or(31, u32::ilog2));
        let has_one = |&k: &u32| self.newest[k as usize] != NONE;
        let order = (least..self.orders).find(has_one).or_else(|| (0..least).rev().find(has_one));
        let block = self.newest[order.expect("enough blocks are free") as usize];
        (block, self.take_at(block, most).expect("a free run begins here"))
    }

    /// Serve a want that fits; the number of runs that are written to `answer`.
    fn serve(&mut self, count: u32, mut after: i64, answer: &mut [Row]) -> usize {
        let (mut left, mut runs) = (count, 0);
        while left > 0 {
            let next = if after >= 0 { u32::try_from(after.saturating_add(1)).ok() } else { None };
            let behind = next.and_then(|block| Some((block, self.take_at(block, left)?)));
            let (block, size) = behind.unwrap_or_else(|| self.take_best(left));
            let begins = i64::from(block);
            match answer[..runs].last_mut() {
                Some(last) if last[0] + last[1] == begins => last[1] += i64::from(size),
                _ => {
                    answer[runs] = [begins, i64::from(size)];
                    runs += 1;
                }
            }
            left -= size;
            after = begins + i64::from(size) - 1;
        }
        runs
    }

    /// Blocks of a release, if they are within the memory and all in use.
    fn in_use(&self, [start, length]: Row) -> Option<std::ops::Range<usize>> {
        let (begin, length) = (usize::try_from(start).ok()?, usize::try_from(length).ok()?);
        let blocks = begin..begin.checked_add(length)?;
        let fine = length > 0 && self.used.get(blocks.clone())?.iter().all(|&used| used);
        fine.then_some(blocks)
    }

    /// Take the marks of all releases, or of none: the index of the first that cannot be released.
    fn unmark(&mut self, release: &[Row]) -> Result<(), usize> {
        for (index, &row) in release.iter().enumerate() {
            let Some(blocks) = self.in_use(row) else {
                for [start, length] in &release[..index] {
                    self.used[*start as usize..(start + length) as usize].fill(true);
                }
                return Err(index);
            };
            self.used[blocks].fill(false);
        }
        Ok(())
    }

    /// See `buddy_step`.
    fn step(&mut self, release: &[Row], wanted: &[Row], answer: &mut [Row]) -> i64 {
        if let Some(bad) = wanted.iter().position(|want| want[0] < 0) {
            return -1 - (release.len() + bad) as i64;
        }
        let all = i64::from(self.num_blocks);
        let most = wanted.iter().fold(0i64, |sum, want| sum.saturating_add(want[0])).min(all);
        if answer.len() < wanted.len() + most as usize {
            return TOO_SMALL;
        }
        if let Err(bad) = self.unmark(release) {
            return -1 - bad as i64;
        }
        for [start, length] in release {
            self.put(*start as u32, *length as u32);
        }
        let (heads, runs) = answer.split_at_mut(wanted.len());
        let mut at = 0;
        for ([count, after], head) in wanted.iter().zip(heads) {
            *head = [at as i64, -1];
            if *count <= i64::from(self.num_free) {
                let number = self.serve(*count as u32, *after, &mut runs[at..]);
                head[1] = number as i64;
                at += number;
            }
        }
        at as i64
    }
}

/// A new allocator; null where a number is 0 or does not fit 31 bits.
#[no_mangle]
pub extern "C" fn buddy_new(num_blocks: u64, headroom: u64) -> *mut Buddy {
    let fits = |number: u64| (1..1 << 31).contains(&number);
    if !fits(num_blocks) || !fits(headroom) {
        return std::ptr::null_mut();
    }
    Box::into_raw(Box::new(Buddy::new(num_blocks as u32, headroom as u32)))
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
    (0..buddy.orders).rev().find(|&k| buddy.newest[k as usize] != NONE).map_or(0, |k| 1 << k)
}

/// Release, then serve in order. `question` holds the releases and then the wants, `answer` has `room` rows.
///
/// Returns the number of runs. The answer's first rows are (index of the first run, number of runs) of each want, -1
/// where there is not enough for it; then the runs follow. -1 - i: row i of the question is refused; i64::MIN: the
/// answer may need more room. Nothing has changed then.
///
/// # Safety
/// The arrays are as long as is said, and do not overlap; `buddy` is from `buddy_new`, and only one thread uses it.
#[no_mangle]
pub unsafe extern "C" fn buddy_step(
    buddy: *mut Buddy,
    question: *const Row,
    answer: *mut Row,
    room: usize,
    num_release: usize,
    num_wanted: usize,
) -> i64 {
    let (release, wanted) = std::slice::from_raw_parts(question, num_release + num_wanted).split_at(num_release);
    (*buddy).step(release, wanted, std::slice::from_raw_parts_mut(answer, room))
}
