//! Who does what: tiles of queries, their spans of entries, and equal shares of both for the threads.

use crate::layer::{Span, Visible};

/// Queries that the kernel treats together, for which one pass over the keys is enough.
pub(crate) const TILE: usize = 32;
/// Shares are cut at multiples of so many entries.
const GRAIN: usize = 64;

/// Queries `first .. first + count` of the `[G, T]` queries of a row, and what they see of it together.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Tile {
    pub row: usize,
    pub first: usize,
    pub count: usize,
    pub visible: Visible,
}

impl Tile {
    /// Number of entries in both spans.
    pub fn entries(&self) -> usize {
        self.visible.sinks.len() + self.visible.tail.len()
    }

    /// The part `piece` of the tile's entries, as spans of the row: those of the first span come first.
    pub fn spans(&self, piece: Span) -> [Span; 2] {
        let Visible { sinks, tail } = self.visible;
        let first = Span::new(sinks.begin + piece.begin, sinks.end.min(sinks.begin + piece.end));
        let skipped = piece.begin.saturating_sub(sinks.len());
        let second = Span::new(tail.begin + skipped, tail.begin + piece.end.saturating_sub(sinks.len()));
        [first, second]
    }
}

/// `queries` of a row, cut into tiles; `visible` `[T]` is what each step sees, query `i` being at step `i % T`.
pub(crate) fn tiles_of_row(row: usize, queries: usize, visible: &[Visible], tiles: &mut Vec<Tile>) {
    for first in (0..queries).step_by(TILE) {
        let count = TILE.min(queries - first);
        // From T queries on, a tile sees every step.
        let seen = (first..first + count.min(visible.len())).map(|query| visible[query % visible.len()]);
        let visible = seen.fold(Visible::default(), |all, one| Visible {
            sinks: all.sinks.cover(one.sinks),
            tail: all.tail.cover(one.tail),
        });
        tiles.push(Tile { row, first, count, visible });
    }
}

/// A stretch of the entries of a tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Item {
    pub tile: usize,
    pub piece: Span,
}

/// Cuts the tiles' entries into at most `count` shares of equal work, each a list of items in the order of the tiles. One huge
/// row is cut into many items, and many small rows share one share.
pub(crate) fn shares(tiles: &[Tile], count: usize) -> Vec<Vec<Item>> {
    let work: usize = tiles.iter().map(|tile| tile.entries() * weight(tile)).sum();
    let share = work.div_ceil(count.max(1)).max(1);
    let mut shares = vec![Vec::new()];
    let mut done = 0;
    for (index, tile) in tiles.iter().enumerate() {
        let mut begin = 0;
        while begin < tile.entries() {
            let room = (share * shares.len()).saturating_sub(done) / weight(tile);
            let take = room.next_multiple_of(GRAIN).max(GRAIN).min(tile.entries() - begin);
            let piece = Span::new(begin, begin + take);
            shares.last_mut().expect("never empty").push(Item { tile: index, piece });
            begin += take;
            done += take * weight(tile);
            if done >= share * shares.len() && done < work {
                shares.push(Vec::new());
            }
        }
    }
    shares
}

/// The kernel computes four queries at a time.
fn weight(tile: &Tile) -> usize {
    tile.count.div_ceil(4)
}

/// The number of entries to be read, times the number of passes of four queries.
pub(crate) fn work(tiles: &[Tile]) -> usize {
    tiles.iter().map(|tile| tile.entries() * weight(tile)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn tile(row: usize, sinks: usize, gap: usize, tail: usize, count: usize) -> Tile {
        let visible = Visible {
            sinks: Span::new(1, 1 + sinks),
            tail: Span::new(1 + sinks + gap, 1 + sinks + gap + tail),
        };
        Tile { row, first: 0, count, visible }
    }

    proptest! {
        #[test]
        fn shares_hold_every_entry_once_and_are_equal(
            sizes in prop::collection::vec((0usize..40, 0usize..3, prop_oneof![0usize..20, 0usize..20_000], 1usize..33), 1..30),
            count in 1usize..20,
        ) {
            let tiles: Vec<Tile> =
                sizes.iter().enumerate().map(|(row, &(a, gap, b, n))| tile(row, a, gap, b, n)).collect();
            let shares = shares(&tiles, count);
            let largest = shares.iter().map(|share| {
                share.iter().map(|item| item.piece.len() * weight(&tiles[item.tile])).sum::<usize>()
            }).max().unwrap_or(0);
            prop_assert!(shares.len() <= count);
            prop_assert!(largest <= work(&tiles).div_ceil(count) + GRAIN * 8);

            let mut expected = Vec::new();
            for (index, tile) in tiles.iter().enumerate() {
                let Visible { sinks, tail } = tile.visible;
                expected.extend((sinks.begin..sinks.end).chain(tail.begin..tail.end).map(|entry| (index, entry)));
            }
            let found: Vec<(usize, usize)> = shares.iter().flatten().flat_map(|item| {
                let spans = tiles[item.tile].spans(item.piece);
                spans.into_iter().flat_map(move |span| (span.begin..span.end).map(move |entry| (item.tile, entry)))
            }).collect();
            prop_assert_eq!(found, expected);
        }
    }

    #[test]
    fn one_huge_row_beside_small_ones_is_shared_evenly() {
        let tiles = [tile(0, 0, 0, 1, 4), tile(1, 0, 0, 131_072, 4), tile(2, 0, 0, 1, 4)];
        let shares = shares(&tiles, 8);
        assert_eq!(shares.len(), 8);
        for share in shares {
            let entries: usize = share.iter().map(|item| item.piece.len()).sum();
            assert!(entries.abs_diff(131_074 / 8) <= 2 * GRAIN);
        }
    }
}
