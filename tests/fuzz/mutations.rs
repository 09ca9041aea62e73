//! A fixed sequence of mutations of seeds: the same in every run, so that a failure is a failure again.

/// Bytes and words that mean something to some reader.
const TELLING: [&[u8]; 24] = [
    b"\0",
    b"\n",
    b"\r\n",
    b"\t",
    b" ",
    b"%2f",
    b"%252e",
    b"../",
    b"\\",
    b";",
    b":",
    b"@",
    b"//",
    b"\"",
    b"{",
    b"}",
    b"[",
    b"]",
    b",",
    b"-1",
    b"18446744073709551616",
    b"\xff",
    b"\xc3\xa9",
    b"null",
];

/// Makes one input after another out of seeds.
pub struct Mutator<'a> {
    seeds: &'a [&'a [u8]],
    state: u64,
}

impl<'a> Mutator<'a> {
    /// The sequence for these seeds.
    pub fn new(seeds: &'a [&'a [u8]]) -> Self {
        Self {
            seeds,
            state: 0x9e37_79b9_7f4a_7c15,
        }
    }

    /// The next input, and the seed that it is made of: one to four changes.
    pub fn next_input(&mut self) -> (usize, Vec<u8>) {
        let seed = self.below(self.seeds.len());
        let mut input = self.seeds[seed].to_vec();
        for _ in 0..=self.below(4) {
            self.change(&mut input);
        }
        (seed, input)
    }

    fn change(&mut self, input: &mut Vec<u8>) {
        let (from, to) = self.range(input.len());
        match self.below(7) {
            // One bit.
            0 if from < to => input[from] ^= 1 << self.below(8),
            // Any byte.
            1 if from < to => input[from] = self.next() as u8,
            // Something goes.
            2 => drop(input.drain(from..to)),
            // The end goes.
            3 => input.truncate(to),
            // Something stands twice.
            4 => {
                let again = input[from..to].to_vec();
                input.splice(from..from, again);
            }
            // Something of another seed stands here instead.
            5 => {
                let other = self.seeds[self.below(self.seeds.len())];
                let (other_from, other_to) = self.range(other.len());
                input.splice(from..to, other[other_from..other_to].iter().copied());
            }
            // Something telling stands here too.
            _ => {
                let telling = TELLING[self.below(TELLING.len())];
                input.splice(from..from, telling.iter().copied());
            }
        }
    }

    /// A range within a length: short ones mostly.
    fn range(&mut self, length: usize) -> (usize, usize) {
        let from = self.below(length + 1);
        let longest = 1 << self.below(7);
        let to = (from + 1 + self.below(longest)).min(length);
        (from, to.max(from))
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit as u64) as usize
    }

    /// SplitMix64 (Steele, Lea, Flood: Fast Splittable Pseudorandom Number Generators, 2014).
    fn next(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}
