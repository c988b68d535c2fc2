//! Points in time, as people write them: RFC 3339.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

const SECOND_US: i64 = 1_000_000;
const DAY_US: i64 = 86_400 * SECOND_US;
/// 2000-01-01 00:00 UTC, where PostgreSQL's time stamps begin, as Unix time.
const POSTGRES_EPOCH_US: i64 = 946_684_800 * SECOND_US;

/// Microseconds since 1970-01-01 00:00 UTC.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(pub i64);

impl Timestamp {
    /// From PostgreSQL's `TimestampTz`: microseconds since 2000-01-01 00:00 UTC. Values at the
    /// end of the number range, which stand for infinity there, stay at the end.
    pub fn from_postgres(microseconds: i64) -> Self {
        Timestamp(microseconds.saturating_add(POSTGRES_EPOCH_US))
    }

    /// As PostgreSQL's `TimestampTz`: microseconds since 2000-01-01 00:00 UTC.
    pub fn to_postgres(self) -> i64 {
        self.0.saturating_sub(POSTGRES_EPOCH_US)
    }

    /// This much earlier.
    pub fn minus_seconds(self, seconds: u64) -> Self {
        let us = i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(SECOND_US);
        Timestamp(self.0.saturating_sub(us))
    }

    /// This much later.
    pub fn plus_seconds(self, seconds: u64) -> Self {
        let us = i64::try_from(seconds).unwrap_or(i64::MAX).saturating_mul(SECOND_US);
        Timestamp(self.0.saturating_add(us))
    }
}

/// Days since 1970-01-01 of a date of the Gregorian calendar; years begin in March in between, so
/// that the leap day comes last.
fn days_of(year: i64, month: i64, day: i64) -> i64 {
    let march_year = if month <= 2 { year - 1 } else { year };
    let era = march_year.div_euclid(400);
    let year_of_era = march_year.rem_euclid(400);
    let day_of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    let day_of_era = year_of_era * 365 + year_of_era / 4 - year_of_era / 100 + day_of_year;
    era * 146_097 + day_of_era - 719_468
}

/// Year, month, day: the other way round.
fn date_of(days: i64) -> (i64, i64, i64) {
    let shifted = days + 719_468;
    let era = shifted.div_euclid(146_097);
    let day_of_era = shifted.rem_euclid(146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let march_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * march_month + 2) / 5 + 1;
    let month = (march_month + 2) % 12 + 1;
    (year_of_era + era * 400 + i64::from(month <= 2), month, day)
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (year, month, day) = date_of(self.0.div_euclid(DAY_US));
        let of_day = self.0.rem_euclid(DAY_US);
        let (seconds, micros) = (of_day / SECOND_US, of_day % SECOND_US);
        let (hour, minute, second) = (seconds / 3600, seconds / 60 % 60, seconds % 60);
        write!(f, "{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{micros:06}Z")
    }
}

/// Why a text is no point in time.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{text}' is no point in time; write it with its distance from UTC: 2026-03-25T14:03:27Z, \
     or 2026-03-25 15:03:27.25+01:00"
)]
pub struct TimestampParseError {
    /// The text that was given.
    pub text: String,
}

impl FromStr for Timestamp {
    type Err = TimestampParseError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        parse(text).ok_or_else(|| TimestampParseError { text: text.to_owned() })
    }
}

/// A number of exactly so many digits.
fn digits(text: &str, count: usize) -> Option<i64> {
    let plain = text.len() == count && text.bytes().all(|byte| byte.is_ascii_digit());
    plain.then(|| text.parse().ok()).flatten()
}

fn within(number: i64, range: std::ops::RangeInclusive<i64>) -> Option<i64> {
    range.contains(&number).then_some(number)
}

fn parse(text: &str) -> Option<Timestamp> {
    let (date, rest) = text.split_at_checked(10)?;
    let rest = rest.strip_prefix(['T', 't', ' '])?;
    let mut parts = date.splitn(3, '-');
    let year = digits(parts.next()?, 4)?;
    let month = within(digits(parts.next()?, 2)?, 1..=12)?;
    let day = within(digits(parts.next()?, 2)?, 1..=31)?;
    let days = days_of(year, month, day);
    if date_of(days) != (year, month, day) {
        return None;
    }
    let (clock, rest) = rest.split_at_checked(8)?;
    let mut parts = clock.splitn(3, ':');
    let hour = within(digits(parts.next()?, 2)?, 0..=23)?;
    let minute = within(digits(parts.next()?, 2)?, 0..=59)?;
    let second = within(digits(parts.next()?, 2)?, 0..=59)?;
    let zone_at = rest.find(['Z', 'z', '+', '-'])?;
    let (fraction, zone) = rest.split_at_checked(zone_at)?;
    let micros = match fraction.strip_prefix('.') {
        None if fraction.is_empty() => 0,
        None => return None,
        Some(fraction) => {
            let len = within(fraction.len() as i64, 1..=6)? as usize;
            digits(fraction, len)? * 10i64.pow(6 - len as u32)
        }
    };
    let seconds = hour * 3600 + minute * 60 + second - zone_seconds(zone)?;
    Some(Timestamp(days * DAY_US + seconds * SECOND_US + micros))
}

/// Seconds east of UTC.
fn zone_seconds(zone: &str) -> Option<i64> {
    if zone.eq_ignore_ascii_case("z") {
        return Some(0);
    }
    let sign = if zone.starts_with('-') { -1 } else { 1 };
    let (hours, minutes) = zone.strip_prefix(['+', '-'])?.split_once(':')?;
    let hours = within(digits(hours, 2)?, 0..=23)?;
    let minutes = within(digits(minutes, 2)?, 0..=59)?;
    Some(sign * (hours * 3600 + minutes * 60))
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_points() {
        for (text, unix_s) in [
            ("1970-01-01T00:00:00Z", 0),
            ("2000-01-01T00:00:00Z", 946_684_800),
            ("2024-02-29T12:00:00Z", 1_709_208_000),
            ("2026-03-25 15:03:27+01:00", 1_774_447_407),
            ("1969-12-31T23:59:59Z", -1),
            ("1600-02-29t00:00:00z", -11_670_998_400),
        ] {
            let parsed: Timestamp = text.parse().unwrap();
            assert_eq!(parsed, Timestamp(unix_s * SECOND_US), "{text}");
        }
        assert_eq!(Timestamp::from_postgres(0).to_string(), "2000-01-01T00:00:00.000000Z");
        assert_eq!("1970-01-01T00:00:00.25-00:01".parse(), Ok(Timestamp(60_250_000)));
        assert_eq!(Timestamp(i64::MIN).minus_seconds(u64::MAX), Timestamp(i64::MIN));
        assert_eq!(Timestamp::from_postgres(i64::MAX), Timestamp(i64::MAX));
        let _ = (Timestamp(i64::MIN).to_string(), Timestamp(i64::MAX).to_string());
    }

    #[test]
    fn text_forms_are_read_back() {
        let mut rng = fastrand::Rng::with_seed(1);
        for _ in 0..20_000 {
            let time = Timestamp(rng.i64(-62_000_000_000_000_000..250_000_000_000_000_000));
            assert_eq!(time.to_string().parse(), Ok(time));
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for bad in [
            "",
            "now",
            "2026-03-25",
            "2026-03-25T14:03:27",
            "2026-02-29T00:00:00Z",
            "2026-13-01T00:00:00Z",
            "2026-03-25T24:00:00Z",
            "2026-03-25T14:03:27.Z",
            "2026-03-25T14:03:27.1234567Z",
            "2026-03-25T14:03:27x1Z",
            "2026-03-25T14:03:27+1",
            "2026-03-25T14:03:27+01:00x",
            "+026-03-25T14:03:27Z",
            "2026-03-2é14:03:27Z",
        ] {
            assert!(bad.parse::<Timestamp>().is_err(), "{bad:?} was taken");
        }
    }
}
