//! Times for people, in the host's time zone, and for scripts, in UTC.

use std::mem::MaybeUninit;
use std::time::{SystemTime, UNIX_EPOCH};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// The local time of day, `14:02`; with the date, `2026-11-21 14:02`, where that is not today's.
pub(crate) fn time_of_day(at: SystemTime) -> String {
    as_of(at, SystemTime::now())
}

/// RFC 3339 in UTC, to the second: `2026-11-21T13:02:07Z`.
pub(crate) fn rfc3339(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at).replace_nanosecond(0);
    // Fails for years that RFC 3339 can't write.
    at.ok()
        .and_then(|at| at.format(&Rfc3339).ok())
        .unwrap_or_default()
}

/// What [`rfc3339`] has written.
pub(crate) fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    OffsetDateTime::parse(text, &Rfc3339).ok().map(SystemTime::from)
}

fn as_of(at: SystemTime, now: SystemTime) -> String {
    let Some(then) = local(at) else {
        return rfc3339(at);
    };
    let time = format!("{:02}:{:02}", then.tm_hour, then.tm_min);
    let is_today = local(now).is_some_and(|now| (now.tm_year, now.tm_yday) == (then.tm_year, then.tm_yday));
    if is_today {
        return time;
    }
    format!(
        "{}-{:02}-{:02} {time}",
        i64::from(then.tm_year) + 1900,
        then.tm_mon + 1,
        then.tm_mday
    )
}

/// Nothing for times before 1970, or beyond what the C library can tell.
fn local(at: SystemTime) -> Option<libc::tm> {
    let seconds = at.duration_since(UNIX_EPOCH).ok()?.as_secs();
    let seconds: libc::time_t = seconds.try_into().ok()?;
    let mut parts = MaybeUninit::<libc::tm>::zeroed();
    // SAFETY: both pointers are to live values of these types. It may read TZ, and nothing in this program changes the
    // environment (clippy.toml).
    let filled = unsafe { libc::localtime_r(&raw const seconds, parts.as_mut_ptr()) };
    // SAFETY: it was zeroed, which is a value of this plain struct, and then filled.
    (!filled.is_null()).then(|| unsafe { parts.assume_init() })
}

#[cfg(test)]
mod tests {
    use std::process::Command;
    use std::time::Duration;

    use super::*;

    fn date(at: SystemTime, format: &str) -> String {
        let seconds = at.duration_since(UNIX_EPOCH).unwrap().as_secs();
        let output = Command::new("date")
            .args(["-d", &format!("@{seconds}"), format])
            .output()
            .unwrap();
        String::from_utf8(output.stdout).unwrap().trim().to_owned()
    }

    #[test]
    fn local_times_are_those_of_date() {
        let now = SystemTime::now();
        assert_eq!(as_of(now, now), date(now, "+%H:%M"));
        for days in [1, 40, 366, 20_000] {
            let then = now - Duration::from_secs(days * 86_400);
            assert_eq!(as_of(then, now), date(then, "+%Y-%m-%d %H:%M"));
        }
    }

    #[test]
    fn scripts_get_utc_and_it_comes_back() {
        let at = UNIX_EPOCH + Duration::from_millis(1_795_266_127_500);
        assert_eq!(rfc3339(at), "2026-11-21T13:02:07Z");
        let whole = UNIX_EPOCH + Duration::from_secs(1_795_266_127);
        assert_eq!(parse_rfc3339(&rfc3339(at)), Some(whole));
        assert_eq!(parse_rfc3339("14:02"), None);
    }
}
