//! What a prompt is made of: tokens of text, and the tokens that a picture or a piece of sound became.

use llama_cpp_4::token::LlamaToken;

/// One cell's worth of a prompt or an answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unit {
    /// A token of text.
    Text(LlamaToken),
    /// A part of an encoded piece of media.
    Media {
        /// Which piece: equal numbers are equal content.
        piece: u32,
        /// The place in it.
        index: u32,
        /// By how much the positions go on behind it: a picture may stand at one position with all its parts.
        advance: u32,
        /// Whether its parts attend to each other both ways: then they are computed in one step.
        is_non_causal: bool,
    },
}

impl Unit {
    /// The token, if it is text.
    pub fn text(self) -> Option<LlamaToken> {
        match self {
            Self::Text(token) => Some(token),
            Self::Media { .. } => None,
        }
    }

    /// The piece of media that it is of.
    pub fn piece(self) -> Option<u32> {
        match self {
            Self::Text(_) => None,
            Self::Media { piece, .. } => Some(piece),
        }
    }

    /// Whether it is of a piece that is computed in one step.
    pub fn is_non_causal(self) -> bool {
        matches!(self, Self::Media { is_non_causal: true, .. })
    }

    /// Whether it cannot be told from what is before it: a piece of media is shared or cut only as a whole.
    pub fn is_inside(self) -> bool {
        matches!(self, Self::Media { index: 1.., .. })
    }

    fn advance(self) -> usize {
        match self {
            Self::Text(_) => 1,
            Self::Media { advance, .. } => advance as usize,
        }
    }
}

impl From<LlamaToken> for Unit {
    fn from(token: LlamaToken) -> Self {
        Self::Text(token)
    }
}

/// The position that follows these.
pub fn positions(units: &[Unit]) -> usize {
    units.iter().map(|unit| unit.advance()).sum()
}

/// How many both begin with, down to the beginning of a piece of media that is not whole in both.
pub fn common(one: &[Unit], other: &[Unit]) -> usize {
    let mut shared = one.iter().zip(other).take_while(|(one, other)| one == other).count();
    let is_inside = |at: usize| [one, other].iter().any(|units| units.get(at).is_some_and(|unit| unit.is_inside()));
    while shared > 0 && is_inside(shared) {
        shared -= 1;
    }
    shared
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A picture of four parts that takes two positions.
    fn picture(piece: u32) -> Vec<Unit> {
        (0..4)
            .map(|index| Unit::Media { piece, index, advance: if index == 3 { 2 } else { 0 }, is_non_causal: false })
            .collect()
    }

    fn text(tokens: &[i32]) -> Vec<Unit> {
        tokens.iter().map(|&token| LlamaToken(token).into()).collect()
    }

    #[test]
    fn positions_go_on_as_the_pieces_say() {
        let units = [text(&[1, 2]), picture(7), text(&[3])].concat();
        let at: Vec<_> = (0..=units.len()).map(|until| positions(&units[..until])).collect();
        assert_eq!(at, [0, 1, 2, 2, 2, 2, 4, 5]);
    }

    #[test]
    fn a_picture_is_shared_as_a_whole_or_not_at_all() {
        let units = [text(&[1]), picture(7), text(&[2, 3])].concat();
        let other = [text(&[1]), picture(8), text(&[2, 3])].concat();
        assert_eq!(common(&units, &units), units.len());
        assert_eq!(common(&units, &other), 1);
        assert_eq!(common(&units[..3], &units), 1, "it was broken off within the picture");
        assert_eq!(common(&units[..5], &units), 5);
    }
}
