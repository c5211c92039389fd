//! A fixed pool of KV blocks: reference counts, an O(1) free list and a prefix index.
//!
//! A freed block keeps its content and stays findable by the hash of the tokens behind it until it is taken
//! again: blocks that nothing could find go first, then the longest freed. Hashes are chained from a seed that holds the policy version, so a block that older
//! weights computed is never found. The pool knows ids and tokens, not the buffers.

use std::collections::HashMap;

use rft_kernels::BLOCK;

use crate::types::{PolicyVersion, TokenId};

const NONE: u32 = u32::MAX;

/// Identity of a full block's content: the policy version and all tokens up to its end, chained.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PrefixHash([u8; 32]);

impl PrefixHash {
    /// The empty prefix under one policy version.
    pub fn root(version: PolicyVersion) -> Self {
        Self(*blake3::hash(&version.0.to_le_bytes()).as_bytes())
    }

    /// The prefix behind each full block of `tokens`.
    pub fn of_blocks(version: PolicyVersion, tokens: &[TokenId]) -> Vec<Self> {
        let blocks = tokens.chunks_exact(BLOCK);
        let chained = blocks.scan(Self::root(version), |hash, block| {
            *hash = hash.then(block);
            Some(*hash)
        });
        chained.collect()
    }

    /// This prefix followed by a block of tokens.
    pub fn then(self, block: &[TokenId]) -> Self {
        let mut hasher = blake3::Hasher::new_keyed(&self.0);
        for token in block {
            hasher.update(&token.to_le_bytes());
        }
        Self(*hasher.finalize().as_bytes())
    }
}

#[derive(Debug, Clone)]
struct Block {
    references: u32,
    hash: Option<PrefixHash>,
    /// Neighbours in the free list while `references` is 0.
    previous: u32,
    next: u32,
}

/// The pool.
#[derive(Debug)]
pub struct BlockPool {
    blocks: Vec<Block>,
    by_hash: HashMap<PrefixHash, u32>,
    head: u32,
    tail: u32,
    free: usize,
    peak: usize,
}

impl BlockPool {
    /// `capacity` free blocks.
    pub fn new(capacity: usize) -> Self {
        let mut pool = Self {
            blocks: vec![Block { references: 0, hash: None, previous: NONE, next: NONE }; capacity],
            by_hash: HashMap::new(),
            head: NONE,
            tail: NONE,
            free: 0,
            peak: 0,
        };
        (0..capacity as u32).for_each(|id| pool.push_free(id));
        pool
    }

    /// Blocks in all.
    pub fn capacity(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds.
    pub fn free(&self) -> usize {
        self.free
    }

    /// Most blocks held at once since [`BlockPool::reset_peak`].
    pub fn peak(&self) -> usize {
        self.peak
    }

    /// Starts the peak again from what is held now.
    pub fn reset_peak(&mut self) {
        self.peak = self.capacity() - self.free;
    }

    /// Takes the first block of the free list; its content is forgotten.
    pub fn take(&mut self) -> Option<u32> {
        let id = (self.head != NONE).then_some(self.head)?;
        self.unlink(id);
        if let Some(hash) = self.blocks[id as usize].hash.take() {
            self.by_hash.remove(&hash);
        }
        self.blocks[id as usize].references = 1;
        Some(id)
    }

    /// Holds a block once more, taking it off the free list if it was there.
    pub fn retain(&mut self, id: u32) {
        if self.blocks[id as usize].references == 0 {
            self.unlink(id);
        }
        self.blocks[id as usize].references += 1;
    }

    /// Lets go of a block; the last holder frees it.
    pub fn release(&mut self, id: u32) {
        let block = &mut self.blocks[id as usize];
        assert!(block.references > 0, "block {id} is released more often than it is held");
        block.references -= 1;
        if block.references == 0 {
            match self.blocks[id as usize].hash {
                Some(_) => self.push_free(id),
                None => self.push_free_first(id),
            }
        }
    }

    /// Whether several hold the block, so that a writer needs a copy.
    pub fn is_shared(&self, id: u32) -> bool {
        self.blocks[id as usize].references > 1
    }

    /// Makes a full block findable. The first block of a prefix wins.
    pub fn publish(&mut self, id: u32, hash: PrefixHash) {
        if self.blocks[id as usize].hash.is_none() && !self.by_hash.contains_key(&hash) {
            self.blocks[id as usize].hash = Some(hash);
            self.by_hash.insert(hash, id);
        }
    }

    /// The published block behind a prefix.
    pub fn find(&self, prefix: &PrefixHash) -> Option<u32> {
        self.by_hash.get(prefix).copied()
    }

    /// Whether somebody holds the block.
    pub fn is_held(&self, id: u32) -> bool {
        self.blocks[id as usize].references > 0
    }

    fn unlink(&mut self, id: u32) {
        let (previous, next) = (self.blocks[id as usize].previous, self.blocks[id as usize].next);
        match previous {
            NONE => self.head = next,
            p => self.blocks[p as usize].next = next,
        }
        match next {
            NONE => self.tail = previous,
            n => self.blocks[n as usize].previous = previous,
        }
        self.free -= 1;
        self.peak = self.peak.max(self.capacity() - self.free);
    }

    fn push_free_first(&mut self, id: u32) {
        let head = self.head;
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (NONE, head);
        match head {
            NONE => self.tail = id,
            h => self.blocks[h as usize].previous = id,
        }
        self.head = id;
        self.free += 1;
    }

    fn push_free(&mut self, id: u32) {
        let tail = self.tail;
        let block = &mut self.blocks[id as usize];
        (block.previous, block.next) = (tail, NONE);
        match tail {
            NONE => self.head = id,
            t => self.blocks[t as usize].next = id,
        }
        self.tail = id;
        self.free += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_freed_block_is_found_until_it_is_taken_again() {
        let (mut pool, v) = (BlockPool::new(2), PolicyVersion(3));
        let tokens: Vec<u32> = (0..BLOCK as u32).collect();
        let prefix = PrefixHash::of_blocks(v, &tokens)[0];
        let (id, other) = (pool.take().unwrap(), pool.take().unwrap());
        pool.publish(id, prefix);
        pool.release(id);
        pool.release(other);
        assert_eq!((pool.find(&prefix), pool.is_held(id)), (Some(id), false));
        // the one that was freed last goes first: nothing can find it
        assert_eq!((pool.take(), pool.find(&prefix)), (Some(other), Some(id)));
        assert_eq!((pool.take(), pool.find(&prefix)), (Some(id), None));
        assert_eq!(pool.take(), None);
    }

    #[test]
    fn no_block_is_found_under_another_policy_version() {
        let mut pool = BlockPool::new(1);
        let tokens: Vec<u32> = (0..BLOCK as u32).collect();
        let id = pool.take().unwrap();
        pool.publish(id, PrefixHash::root(PolicyVersion(1)).then(&tokens));
        let found = [2, 1].map(|v| pool.find(&PrefixHash::of_blocks(PolicyVersion(v), &tokens)[0]));
        assert_eq!(found, [None, Some(id)]);
    }

    #[test]
    fn the_last_holder_frees() {
        let mut pool = BlockPool::new(3);
        let id = pool.take().unwrap();
        pool.retain(id);
        assert!(pool.is_shared(id));
        pool.release(id);
        assert_eq!((pool.free(), pool.is_shared(id)), (2, false));
        pool.release(id);
        assert_eq!((pool.free(), pool.peak()), (3, 1));
    }
}
