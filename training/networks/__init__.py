"""The networks of a training: base, student, teacher, fake score, discriminator; and running a student."""
