//! Pieces of media as a model reads them, and what is kept of them: encoded ones as far as there is room, and what they take in a prompt
//! for as long as the cache of keys and values may hold them.

use std::collections::HashMap;
use std::sync::Arc;

use llama_cpp_4::mtmd::{MtmdInputChunk, MtmdInputChunkType};
use llama_cpp_4::token::LlamaToken;
use sarai_core::MediaKind;

use crate::unit::Unit;

/// What a piece takes in a prompt, encoded or not.
pub struct Shape {
    /// What it is known by: equal numbers are equal content.
    pub number: u32,
    /// For each of its parts, the positions: one, or four with a rotation that knows lines and columns. The first one's is 0.
    places: Vec<[i32; 4]>,
    /// By how much the positions go on behind it.
    advance: u32,
    /// Whether its parts attend to each other both ways.
    is_non_causal: bool,
}

impl Shape {
    /// Of a chunk of llama.cpp's.
    pub fn of(chunk: &MtmdInputChunk<'_>, number: u32, is_non_causal: bool) -> Self {
        Self { number, places: places(chunk), advance: u32::try_from(chunk.n_pos()).unwrap_or_default(), is_non_causal }
    }

    /// How many tokens' places it takes.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    fn units(&self) -> impl Iterator<Item = Unit> + '_ {
        let last = self.len().saturating_sub(1);
        // What stands at positions of its own goes on by one with each part, a picture with lines and columns at its end.
        let is_even = self.advance as usize == self.len();
        (0..self.len()).map(move |index| Unit::Media {
            piece: self.number,
            index: u32::try_from(index).unwrap_or(u32::MAX),
            advance: match is_even {
                true => 1,
                false if index == last => self.advance,
                false => 0,
            },
            is_non_causal: self.is_non_causal,
        })
    }
}

/// Of a picture, lines and columns; sound goes on by one in all of them.
fn places(chunk: &MtmdInputChunk<'_>) -> Vec<[i32; 4]> {
    let number = |n: u32| i32::try_from(n).unwrap_or(i32::MAX);
    match chunk.image_tokens().filter(|_| chunk.chunk_type() == MtmdInputChunkType::Image) {
        Some(image) => {
            let positions = image.decoder_positions(0);
            positions.into_iter().map(|at| [number(at.t), number(at.y), number(at.x), number(at.z)]).collect()
        }
        None => (0..chunk.n_tokens()).map(|index| [i32::try_from(index).unwrap_or(i32::MAX); 4]).collect(),
    }
}

/// An encoded piece.
pub struct Piece {
    shape: Arc<Shape>,
    /// One after the other, what stands in the place of a token's embedding.
    embedding: Vec<f32>,
}

impl Piece {
    /// A piece, if there is an embedding of this width for each of its parts.
    pub fn new(shape: Arc<Shape>, embedding: Vec<f32>, width: usize) -> Option<Self> {
        let is_whole = shape.len() > 0 && embedding.len() == shape.len() * width;
        is_whole.then_some(Self { shape, embedding })
    }

    /// What stands in the place of a token's embedding, and its place counted from the piece's own.
    pub fn part(&self, index: usize) -> (&[f32], [i32; 4]) {
        let width = self.embedding.len() / self.shape.len();
        (&self.embedding[index * width..(index + 1) * width], self.shape.places[index])
    }

    fn bytes(&self) -> usize {
        self.embedding.len() * size_of::<f32>()
    }
}

/// Pieces of one prompt, by their numbers.
pub type Pieces = HashMap<u32, Arc<Piece>>;

/// What a piece of media is cut into.
pub enum Cut {
    /// A mark around the pieces.
    Mark(LlamaToken),
    /// A piece.
    Piece(Arc<Shape>),
}

impl Cut {
    /// What it is in a prompt.
    pub fn units(&self) -> Vec<Unit> {
        match self {
            Self::Mark(token) => vec![Unit::Text(*token)],
            Self::Piece(shape) => shape.units().collect(),
        }
    }

    /// The piece, if it is one.
    pub fn shape(&self) -> Option<&Arc<Shape>> {
        match self {
            Self::Mark(_) => None,
            Self::Piece(shape) => Some(shape),
        }
    }

    fn len(&self) -> usize {
        match self {
            Self::Mark(_) => 1,
            Self::Piece(shape) => shape.len(),
        }
    }
}

/// All that a piece of media is cut into, in order.
pub type Cuts = Arc<[Cut]>;

/// What a file of media is known by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Content {
    /// What it is taken for.
    pub kind: MediaKind,
    /// Of the file.
    pub sha256: [u8; 32],
}

/// What is kept of pieces.
pub struct Store {
    /// What each content is cut into.
    known: Recent<Content, Cuts>,
    /// Encoded pieces, by number.
    encoded: Recent<u32, Arc<Piece>>,
    next_number: u32,
}

impl Store {
    /// Keeps encoded pieces of so many bytes at most, and knows the content of so many tokens' places: the cache of keys and values holds
    /// no more.
    pub fn new(bytes: u64, tokens: u32) -> Self {
        let known = Recent::new(tokens as usize, |cuts: &Cuts| cuts.iter().map(Cut::len).sum());
        let encoded = Recent::new(usize::try_from(bytes).unwrap_or(usize::MAX), |piece: &Arc<Piece>| piece.bytes());
        Self { known, encoded, next_number: 0 }
    }

    /// A number that no piece has yet.
    pub fn number(&mut self) -> u32 {
        self.next_number += 1;
        self.next_number
    }

    /// What a content was cut into, if it is known.
    pub fn cuts(&mut self, content: &Content) -> Option<Cuts> {
        self.known.get(content).cloned()
    }

    /// Knows from now on what a content is cut into.
    pub fn know(&mut self, content: Content, cuts: Cuts) {
        self.known.put(content, cuts);
    }

    /// An encoded piece, if it is kept.
    pub fn encoded(&mut self, number: u32) -> Option<Arc<Piece>> {
        self.encoded.get(&number).cloned()
    }

    /// Keeps an encoded piece.
    pub fn keep(&mut self, piece: &Arc<Piece>) {
        self.encoded.put(piece.shape.number, Arc::clone(piece));
    }
}

/// Values up to some weight together, those that were used last.
struct Recent<K, V> {
    /// The one used last is the last.
    values: Vec<(K, V)>,
    room: usize,
    weight: fn(&V) -> usize,
}

impl<K: PartialEq, V> Recent<K, V> {
    fn new(room: usize, weight: fn(&V) -> usize) -> Self {
        Self { values: Vec::new(), room, weight }
    }

    fn get(&mut self, key: &K) -> Option<&V> {
        let at = self.values.iter().position(|(known, _)| known == key)?;
        self.values[at..].rotate_left(1);
        self.values.last().map(|(_, value)| value)
    }

    fn put(&mut self, key: K, value: V) {
        self.values.retain(|(known, _)| *known != key);
        self.values.push((key, value));
        let mut room = self.room;
        let fits = |(_, value): &&(K, V)| {
            let weight = (self.weight)(value);
            let has_room = weight <= room;
            room = room.saturating_sub(weight);
            has_room
        };
        let stay = self.values.iter().rev().take_while(fits).count();
        self.values.drain(..self.values.len() - stay);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_used_last_stays() {
        let mut recent = Recent::new(10, |weight: &usize| *weight);
        (1..=4).for_each(|key| recent.put(key, 3));
        assert_eq!(recent.get(&1), None);
        assert_eq!(recent.get(&2), Some(&3));
        recent.put(5, 4);
        let keys: Vec<_> = recent.values.iter().map(|(key, _)| *key).collect();
        assert_eq!(keys, [4, 2, 5]);
        recent.put(6, 11);
        assert!(recent.values.is_empty(), "what is too large pushes the others out, and is not kept itself");
    }
}
