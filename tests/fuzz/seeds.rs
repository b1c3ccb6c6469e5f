//! Writes the seeds of every target into `corpus/TARGET`, from where cargo-fuzz takes them.

use std::fs;
use std::path::Path;

fn main() -> std::io::Result<()> {
    for target in virtseal::fuzz::targets() {
        let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target.name);
        fs::create_dir_all(&corpus)?;
        for (number, seed) in (target.seeds)().iter().enumerate() {
            fs::write(corpus.join(format!("seed-{number}")), seed)?;
        }
    }
    Ok(())
}
