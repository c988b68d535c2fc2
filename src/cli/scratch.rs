//! A directory of its own for everything that a command starts.

use std::fs;
use std::ops::Deref;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use nix::unistd::mkdtemp;

use super::pg::{PgError, give_to_servers};

/// A new directory below the system's temporary one. It belongs to the servers' user, others may
/// look into it (the wal-redo process's user has to get through), and it is removed with this
/// value: what runs in it must have ended by then.
pub struct Scratch(PathBuf);

impl Scratch {
    /// `name` is part of the directory's name. One that an earlier run has left behind is never
    /// taken, whatever its process was called.
    ///
    /// # Errors
    /// It cannot be made, or be given to the servers' user.
    pub fn new(name: &str) -> Result<Scratch, PgError> {
        let random = "X".repeat(6);
        let template = std::env::temp_dir().join(format!("pgstrata-{name}-{random}"));
        let failed = || PgError::os(template.display().to_string());
        let path = mkdtemp(&template).map_err(|errno| failed()(errno.into()))?;
        let scratch = Scratch(path);
        give_to_servers(&scratch)?;
        fs::set_permissions(&scratch.0, fs::Permissions::from_mode(0o755)).map_err(failed())?;
        Ok(scratch)
    }
}

impl Deref for Scratch {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_has_its_own_and_takes_it_along() {
        let [one, other] = ["scratch"; 2].map(|name| Scratch::new(name).unwrap());
        assert_ne!(*one, *other);
        let path = one.to_owned();
        fs::write(path.join("file"), "x").unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o755);
        drop(one);
        assert!(!path.exists() && other.is_dir());
    }
}
